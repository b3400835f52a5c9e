"""How much device memory a traced call takes: the call and its recording run on tensors without data, and are counted.

Nothing is estimated by formula: the denoiser is called with the rows of the largest batch, the recorder keeps and reduces
what it keeps and reduces in a real step, and the autoencoder decodes; every tensor that is made is counted as long as it
lives. Of what kernels use within themselves the largest is counted, too: a convolution on a GPU brings both its sides into
the order (row, y, x, channel), in memory of its own. What is left out is small (matrix products, splits).
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interp.calls import DenoiserCall
from interp.families import Arguments, DenoiserInputs, Family
from interp.hooks import HookRegistry
from interp.offloading import at_once, coming
from interp.undressing import undressed, without_data

if TYPE_CHECKING:
    from interp.planning import Plan


class Counted(TorchDispatchMode):
    """Count the bytes of all tensors that operations make while active, and the most that lived at once.

    device: the type of the device whose tensors count; None for all.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self._device = device
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and self._device in (None, t.device.type)]
        for storage in (t.untyped_storage() for t in made):
            if id(storage) not in given:
                self._note(storage)
        if func is torch.ops.aten.convolution.default:
            self.most = max(self.most, self.now + _reordered(args[0], out))
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self.now += size
        self.most = max(self.most, self.now)
        self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size


def _reordered(*sides: torch.Tensor) -> int:
    """Bytes that a convolution on a GPU takes for itself: cuDNN computes channels last, and copies what lies otherwise."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}
    turned = [t for t in sides if t.is_cuda and t.ndim in order and not t.is_contiguous(memory_format=order[t.ndim])]
    return _bytes(turned)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def weights(pipe: Any, running: Iterable[torch.nn.Module] = ()) -> int:
    """Bytes of a pipeline's parameters and buffers that are on its device while some parts run.

    Of offloaded ones those that come for the call of a part that runs count, as many of them as are there at once.
    """
    parts = [p for p in pipe.components.values() if isinstance(p, torch.nn.Module)]
    device = getattr(pipe, "_execution_device", pipe.device).type
    away = {id(t) for p in parts for brought in coming(p).values() for t in brought}
    here = (t for p in parts for t in (*p.parameters(), *p.buffers()) if t.device.type == device and id(t) not in away)
    stay = {t.data_ptr(): t.untyped_storage().nbytes() for t in here}
    return sum(stay.values()) + sum(map(at_once, running))


def peak_memory(family: Family, plan: "Plan", recorded: bool = True) -> int:
    """Bytes of device memory at the peak of a call with the plan's largest batch.

    Args:
        family: Of the pipeline.
        plan: What is recorded.
        recorded: False counts the same call untraced.
    """
    return max(plan.memory_around, weights(family.pipe, family.denoisers.values()) + _denoising(family, plan, recorded))


def memory_around(family: Family, plan: "Plan") -> int:
    """Bytes of device memory at the peak of what comes before the denoising and after it, which no recording changes."""
    held = partial(weights, family.pipe)
    encoding = [held([encoder]) + working for encoder, working in _encoding(family, plan)]
    vae: Any = getattr(family.pipe, "vae", None)
    decoding = held([vae]) + _decoding(family, plan, vae) if plan.capture.image and hasattr(vae, "decode") else 0
    return max(*encoding, decoding, 0)


def _encoding(family: Family, plan: "Plan") -> Iterator[tuple[torch.nn.Module, int]]:
    """The text of a batch, which each encoder reads at its full length; a language model keeps the states of all layers."""
    rows = max(map(len, plan.batches))
    arguments = plan.arguments if family.encodes_padded else _as_long(family, plan)
    segments = family.text_segments(arguments)
    for name, (tokenizer, encoder) in {} if family.fallback else family.text_encoders.items():
        if name in segments:
            length = len(range(family.text_length(arguments))[segments[name]]) + family.encoder_offset
        else:
            length = min(int(tokenizer.model_max_length), 512)
        with undressed(encoder), without_data(encoder) as device, Counted(device) as counted:
            ids = torch.ones(rows, length, dtype=torch.long)
            encoder(input_ids=ids, attention_mask=ids, output_hidden_states=True)
        yield encoder, counted.most


def _denoising(family: Family, plan: "Plan", recorded: bool) -> int:
    """One step: every branch's denoiser call, then the reductions."""
    from interp.recorder import Recorder

    batch = max(plan.batches, key=len)
    branches = ("uncond", "cond") if family.guided(plan.arguments) else ("cond",)
    calls = [(b,) for b in branches] if family.sequential else [branches]
    with (
        family.rehearsing(),
        HookRegistry(family.pipe, family) as hooks,
        without_data(family.denoiser) as device,
        Counted(device) as counted,
    ):
        recorder = Recorder(hooks, None, plan, batch) if recorded else None  # type: ignore[arg-type]
        step = max(plan.capture.chosen_steps(len(plan.timeline)), default=0)
        outputs = []
        row = family.dry_inputs(_as_long(family, plan))
        kept = repeated(family, row, len(batch) * len(branches))  # latents and text, as the pipeline holds them
        inputs = repeated(family, row, len(batch) * len(calls[0]))
        for one in calls:
            held = dict.fromkeys(one, tuple(range(len(batch))))
            call = DenoiserCall(inputs.args, inputs.kwargs, held, step, lambda: 0.0, 0, len(batch), one)
            outputs.append(hooks.rehearse(inputs, call))
        del row, inputs
        if recorder is not None:
            recorder.rehearse(step, branches)
        del kept
        return counted.most


def _as_long(family: Family, plan: "Plan") -> Arguments:
    """Arguments of a call with the longest of the plan's texts, where the denoiser is given no more positions than tokens."""
    if not family.ragged:
        return plan.arguments
    return {**plan.arguments, "max_sequence_length": max(len(t.ids) for t in (*plan.tokens, *plan.negatives))}


def _decoding(family: Family, plan: "Plan", vae: Any) -> int:
    """The pictures of a batch."""
    rows = 1 if getattr(vae, "use_slicing", False) else max(map(len, plan.batches))
    shape = family.latent_shape(plan.arguments)
    video = any(isinstance(m, torch.nn.Conv3d) for m in vae.modules())
    with undressed(vae), without_data(vae) as device, Counted(device) as counted:
        latents = torch.empty(rows, *shape, dtype=vae.dtype)
        vae.decode(latents.unsqueeze(2) if video else latents, return_dict=False)
    return 2 * counted.most + _bytes(vae.parameters()) if _upcasts(family.pipe, vae) else counted.most


def _upcasts(pipe: Any, vae: Any) -> bool:
    """Tell whether the pipeline decodes in float32 what it computes in float16: some do, where the autoencoder asks for it."""
    return vae.dtype == torch.float16 and hasattr(pipe, "upcast_vae") and getattr(vae.config, "force_upcast", False)


def repeated(family: Family, inputs: DenoiserInputs, rows: int) -> DenoiserInputs:
    """Return inputs of one row with so many rows."""

    def more(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.repeat(rows, *[1] * (value.ndim - 1)) if value.ndim and value.shape[0] == 1 else value
        if isinstance(value, list) and len(value) == 1 and not _of_rows(value[0]):
            return value * rows  # an entry a row
        if isinstance(value, (list, tuple)):
            return type(value)(more(v) for v in value)
        if isinstance(value, Mapping):
            return {k: more(v) for k, v in value.items()}
        return value

    kwargs = {k: v if k in family.shared else more(v) for k, v in inputs.kwargs.items()}
    return DenoiserInputs(tuple(more(a) for a in inputs.args), kwargs)


def _of_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == 1

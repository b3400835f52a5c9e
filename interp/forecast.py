"""How much device memory a traced call takes: the call and its recording run on tensors without data, and are counted.

Nothing is estimated by formula: the denoiser is called with the rows of the largest batch, the recorder keeps and reduces
what it keeps and reduces in a real step, and the autoencoder decodes; every tensor that is made is counted as long as it
lives. What kernels use within themselves (workspaces of convolutions and matrix products) is not seen.
"""

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interp.calls import DenoiserCall
from interp.families import DenoiserInputs, Family
from interp.hooks import HookRegistry
from interp.undressing import undressed, without_data

if TYPE_CHECKING:
    from interp.planning import Plan


class Counted(TorchDispatchMode):
    """Count the bytes of all tensors that operations make while active, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and id(one.untyped_storage()) not in given:
                self._note(one.untyped_storage())
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


def weights(pipe: Any) -> int:
    """Bytes of the parameters and buffers of a pipeline's parts that are on its device."""
    parts = [p for p in pipe.components.values() if isinstance(p, torch.nn.Module)]
    device = pipe.device.type  # a property that walks through the pipeline: not once a tensor
    found = {t.data_ptr(): t for p in parts for t in (*p.parameters(), *p.buffers()) if t.device.type == device}
    return sum(t.untyped_storage().nbytes() for t in found.values())


def peak_memory(family: Family, plan: "Plan", recorded: bool = True) -> int:
    """Bytes of device memory at the peak of a call with the plan's largest batch.

    Args:
        family: Of the pipeline.
        plan: What is recorded.
        recorded: False counts the same call untraced.
    """
    held = weights(family.pipe)
    working = max(_denoising(family, plan, recorded), _decoding(family, plan))
    return held + working


def _denoising(family: Family, plan: "Plan", recorded: bool) -> int:
    """One step: every branch's denoiser call, then the reductions."""
    from interp.recorder import Recorder

    batch = max(plan.batches, key=len)
    branches = ("uncond", "cond") if family.guided(plan.arguments) else ("cond",)
    calls = [(b,) for b in branches] if family.sequential else [branches]
    with (
        family.rehearsing(),
        HookRegistry(family.pipe, family) as hooks,
        without_data(family.denoiser),
        Counted() as counted,
    ):
        recorder = Recorder(hooks, None, plan, batch) if recorded else None  # type: ignore[arg-type]
        step = max(plan.capture.chosen_steps(len(plan.timeline)), default=0)
        outputs = []
        inputs = repeated(family, family.dry_inputs(plan.arguments), len(batch) * len(calls[0]))
        for one in calls:
            held = dict.fromkeys(one, tuple(range(len(batch))))
            call = DenoiserCall(inputs.args, inputs.kwargs, held, step, lambda: 0.0, 0, len(batch), one)
            outputs.append(hooks.rehearse(inputs, call))
        del inputs
        if recorder is not None:
            recorder.rehearse(step, branches)
        return counted.most


def _decoding(family: Family, plan: "Plan") -> int:
    """The pictures of a batch, where they are decoded on the device."""
    vae = getattr(family.pipe, "vae", None)
    if not plan.capture.image or vae is None or not hasattr(vae, "decode"):
        return 0
    rows = 1 if getattr(vae, "use_slicing", False) else max(map(len, plan.batches))
    shape = family.latent_shape(plan.arguments)
    video = any(isinstance(m, torch.nn.Conv3d) for m in vae.modules())
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    with undressed(vae), without_data(vae), Counted() as counted:
        latents = torch.empty(rows, *shape, dtype=vae.dtype)
        vae.decode(latents.unsqueeze(2) if video else latents, return_dict=False)
        return counted.most * (2 if upcast else 1)


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

"""The nnsight model of a pipeline."""

import copy
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from diffusers.utils import BaseOutput
from nnsight.intervention.source import STATE, Controller
from nnsight.modeling.diffusion import DiffusionBatcher, DiffusionModel

from interp.compiling import run_eagerly
from interp.envoy.probabilities import attention_sites, probabilities
from interp.errors import InterpError
from interp.observing import place

_MODELS: WeakKeyDictionary[Any, ref] = WeakKeyDictionary()


def nnsight(pipe: Any) -> "NNsightPipeline":
    """Return an nnsight model over a pipeline's own modules: no second copy of the weights.

    Calls and traces of the model are calls of the pipeline, so that `interp.record` records them, and hooks, edits and
    interventions meet in the same run. Edits that nnsight stores (`with model.edit() as (tracer, edited): …`) run
    within `interp.trace` as `interp.NNsightEdit(edited)`.

    Args:
        pipe: A diffusers pipeline, or what `interp.load` accepts.

    Returns:
        The model, the same one each time; `model.pipeline` is the pipeline, `model.unet` and so on its parts.

    Raises:
        InterpError: `pipe` is no pipeline, and nothing of its name can be loaded.

    >>> import interp
    >>> pipe = interp.load("scenes")
    >>> interp.nnsight(pipe).unet._module is pipe.unet
    True
    """
    from interp.loading import load

    pipe = load(pipe)
    model = _MODELS[pipe]() if pipe in _MODELS else None
    if model is None:
        model = NNsightPipeline(pipe)
        _MODELS[pipe] = ref(model)
    return model


class _Components(torch.nn.Module):
    """A module whose children are a pipeline's parts and whose call is the pipeline's call."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipeline = pipe
        self.follow()

    def follow(self) -> None:
        """Hold the parts that the pipeline has now."""
        parts = {n: part for n, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}
        for name in {*self._modules, *parts}:
            if self._modules.get(name) is not parts.get(name):
                self._modules.pop(name, None)
        for name, part in parts.items():
            self.add_module(name, part)
        for site in attention_sites(self.pipeline):
            place(site.name, site.module).kept = True

    def forward(self, *args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        """Call the pipeline; `seed` means one CPU generator a picture: seed, seed + 1, …"""
        if seed is not None and kwargs.get("generator") is None:
            given = args[0] if args else kwargs.get("prompt")
            count = len(given) if isinstance(given, (list, tuple)) else 1
            count *= int(kwargs.get("num_images_per_prompt") or 1)
            kwargs["generator"] = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
        output = self.pipeline(*args, **kwargs)
        if isinstance(output, BaseOutput):  # nnsight copies a dict by `.copy()`
            object.__setattr__(output, "copy", lambda: copy.copy(output))
        return output


class _Batcher(DiffusionBatcher):
    """Rows of several invokes; refuses the edit in place that would be lost."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lent: list[tuple[int, torch.Tensor, int]] = []

    def _narrow_tensor(self, tensor: torch.Tensor, group: list) -> torch.Tensor:
        part = super()._narrow_tensor(tensor, group)
        if part is not tensor and part._base is None:  # a copy: rows of both branches, which do not lie together
            self._lent.append((group[0], part, part._version))
        return part

    def _widen_tensor(self, full: torch.Tensor, group: list, edited: torch.Tensor) -> torch.Tensor:
        self._lent = [one for one in self._lent if one[0] != group[0]]
        return super()._widen_tensor(full, group, edited)

    def assemble_skip(self, running: Any) -> Any:
        """The end of a visit: nothing that was lent may have been changed and not given back."""
        lent, self._lent = self._lent, []
        if any(part._version != version for _, part, version in lent):
            raise InterpError(
                "an edit in place within one of several invokes is lost under guidance, because nnsight lends it a copy "
                "of its rows; assign instead: write model.unet.output = (changed,), not model.unet.output[0][:] = changed"
            )
        return super().assemble_skip(running)


class NNsightPipeline(DiffusionModel):
    """The nnsight model of a pipeline, made by `interp.nnsight`; see nnsight's documentation for traces and edits."""

    _batcher_class = _Batcher

    def __init__(self, pipe: Any) -> None:
        super().__init__(_Components(pipe))
        self.pipeline = pipe
        self._original = self  # an edited copy keeps the original, and so the tree, alive
        self._seen: tuple[int, ...] = ()
        self.follow()

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        """Open a trace of the whole pipeline: as many steps as the pipeline itself would take."""
        return super(DiffusionModel, self).trace(*inputs, **kwargs)

    def follow(self) -> None:
        """Route the modules as they are now: parts, layers or their `forward` may have been exchanged since."""
        self._module.follow()
        modules = list(self._module.modules())
        for module in modules:
            own = vars(module)
            if STATE in own and not isinstance(own.get("forward"), Controller) and "_hf_hook" not in own:
                del own[STATE]  # whoever put another `forward` there took the controller away
                self._original._seen = ()
        now = tuple(map(id, modules))
        if self._original._seen != now:
            self._update(self._module)
            self._original._seen = now

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `fn` together with the blocks of a trace; nnsight calls it."""
        self.follow()
        undo = run_eagerly([self._module], warn=False)
        try:
            with probabilities(self.pipeline):
                return super().interleave(fn, *args, **kwargs)
        finally:
            undo()

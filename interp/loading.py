"""Loading a pipeline: the bundled model, a Hub id, a local folder, or a pipeline that exists already."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from interp.errors import InterpError, nearest

BUNDLED = "scenes"
_ORIGIN: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
_KEPT: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)
"""Within `loaded_once`: the pipelines by what was asked for."""


def load(
    model: Any, *, device: str | None = None, dtype: torch.dtype | None = None, revision: str | None = None
) -> Any:
    """Return a diffusers pipeline.

    Args:
        model: `"scenes"` (the bundled trained model), a Hub id, a local folder in diffusers format, or a diffusers
            pipeline, which is returned as it is.
        device: Where to put it; default `cuda` if there is one, else `cpu`.
        dtype: Default float32, on a GPU float16 (the bundled model: always float32).
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        InterpError: nothing of that name can be loaded; the sentence says what was tried.

    >>> import interp
    >>> type(interp.load("scenes")).__name__
    'StableDiffusionPipeline'
    """
    if not isinstance(model, (str, Path)):
        if hasattr(model, "scheduler") and callable(model):
            return model
        raise InterpError(
            f"cannot load a {type(model).__name__}: give 'scenes', a Hub id, a local folder or a diffusers pipeline"
        )
    from diffusers import DiffusionPipeline

    name, device = str(model), device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = _locate(name)
    dtype = dtype or (torch.float16 if device.startswith("cuda") and name != BUNDLED else torch.float32)
    kept, key = _KEPT.get(), (source, device, dtype, revision)
    if kept is not None and key in kept:
        return kept[key]
    try:
        with quiet() if name == BUNDLED else nullcontext():
            pipe = DiffusionPipeline.from_pretrained(source, use_safetensors=True, dtype=dtype, revision=revision)
    except Exception as error:  # diffusers and the Hub client raise a dozen types for "not there"
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise InterpError(f"cannot load model {name!r} ({first}); {_known(name)}") from error
    _ORIGIN[pipe] = {"id": name, "revision": revision or ""}
    pipe = pipe.to(device)
    if kept is not None:
        kept[key] = pipe
    return pipe


@contextmanager
def loaded_once() -> Iterator[None]:
    """For several runs of one model: `load` gives the same pipeline again for the same arguments, as long as this lasts."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


@contextmanager
def quiet() -> Iterator[None]:
    """Load without progress bars and notices: the bundled model is there in a second, and needs no torchvision."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    enabled = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if enabled[0]:
            diffusers_logging.enable_progress_bar()
        if enabled[1]:
            transformers_logging.enable_progress_bar()


def origin(pipe: Any) -> dict[str, str]:
    """Where a pipeline came from: `{"id": …, "revision": …}`, as far as known."""
    if pipe in _ORIGIN:
        return _ORIGIN[pipe]
    return {
        "id": str(getattr(pipe, "name_or_path", "") or pipe.config.get("_name_or_path", "") or ""),
        "revision": "",
    }


def _locate(name: str) -> str:
    """Turn a model's name into what diffusers loads."""
    if name == BUNDLED:
        from interp.scenes import folder

        return str(folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise InterpError(f"the folder {name!r} holds no diffusers pipeline: it has no model_index.json")
        return str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InterpError(f"unknown model {name!r}: there is no folder of that name; {_known(name)}")
    return name


def _known(name: str) -> str:
    return (
        "a model is 'scenes' (bundled), a local folder in diffusers format, or a Hub id such as "
        f"'stable-diffusion-v1-5/stable-diffusion-v1-5'{nearest(name, [BUNDLED])}"
    )

"""Cosines in CLIP: of a picture and its text, and of two pictures (CLIPScore of arXiv:2405.15330, Appendix B)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from interp.errors import InterpError
from interp.remembering import Memory, picture_keys
from interp.stores import Run

CLIP_MODEL = "openai/clip-vit-base-patch32"


class Clip:
    """Cosine of picture and text in CLIP, −1 to 1: the CLIPScore (Hessel et al. 2021) without its factor 2.5.

    Option `clip_model`: a Hub id or folder; default is, for runs of `scenes`, the CLIP it was trained with, else
    openai/clip-vit-base-patch32. A text that is longer than CLIP takes is cut.
    """

    def __init__(self, *, clip_model: str | None = None, run: Run | None = None, device: str = "cpu") -> None:
        self.model = encoder(clip_model, run, device)

    def __call__(self, images: np.ndarray, texts: list[str]) -> torch.Tensor:
        """Return the cosine of each picture and its text (sample,)."""
        return (self.model.pictures(images) * self.model.texts(texts)).sum(-1)


class ClipImage:
    """Cosine of a picture and its reference in CLIP, −1 to 1: the paper's CLIPScore(Image).

    Option `clip_model` as for `clip`.
    """

    def __init__(self, *, clip_model: str | None = None, run: Run | None = None, device: str = "cpu") -> None:
        self.model = encoder(clip_model, run, device)

    def __call__(self, images: np.ndarray, references: np.ndarray) -> torch.Tensor:
        """Return the cosine of each picture and its reference (sample,)."""
        return (self.model.pictures(images) * self.model.pictures(references)).sum(-1)


def encoder(clip_model: str | None, run: Run | None, device: str) -> "Encoder":
    """Return what turns pictures and texts into unit vectors of one CLIP."""
    bundled = run is not None and dict(run.attrs.get("pipeline") or {}).get("id") == "scenes"
    return _encoder(None if bundled and clip_model is None else clip_model or CLIP_MODEL, device)


@cache
def _encoder(name: str | None, device: str) -> "Encoder":
    return Encoder(_Scenes(device) if name is None else _Hub(name, device))


class Encoder:
    """Unit vectors of pictures and texts in one CLIP, each computed once as long as it is remembered.

    `clip:prompt`, `clip:target`, `clip_image` and `clip_fid` look at the same pictures, and a reference is one of many.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.features, self.memory = model, int(model.features), Memory()

    def pictures(self, images: np.ndarray) -> torch.Tensor:
        """Return the vectors (sample, feature) of pictures uint8 (sample, height, width, rgb)."""
        return torch.stack(self.memory.recall(picture_keys(images), lambda new: self.model.pictures(images[new])))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the vectors (sample, feature) of texts."""
        return torch.stack(self.memory.recall(texts, lambda new: self.model.texts([texts[i] for i in new])))


class _Scenes:
    """The CLIP that `scenes` was trained with."""

    def __init__(self, device: str) -> None:
        from interp.scenes import folder
        from interp.scenes.scoring import Scorer

        self.scorer = Scorer.of(folder(), device)
        self.features = self.scorer.clip.config.projection_dim

    def pictures(self, images: np.ndarray) -> torch.Tensor:
        from interp.scenes.scoring import to_tensor

        return self.scorer.picture_vectors(to_tensor(images))

    def texts(self, texts: list[str]) -> torch.Tensor:
        return self.scorer.text_vectors(texts)


class _Hub:
    """A CLIP of transformers."""

    def __init__(self, name: str, device: str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.device = device
        self.model = loaded(CLIPModel, name, "CLIP", "clip_model").to(device).eval()
        self.processor = loaded(CLIPProcessor, name, "CLIP", "clip_model")
        self.features = self.model.config.projection_dim

    @torch.no_grad()
    def pictures(self, images: np.ndarray) -> torch.Tensor:
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values.to(self.device)
        return _unit(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(self.device)
        return _unit(self.model.text_projection(self.model.text_model(**inputs).pooler_output))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


@cache
def loaded(kind: Any, name: str, what: str, option: str) -> Any:
    """Return a model or processor of transformers, loaded once; InterpError if it cannot be had."""
    from transformers import PreTrainedModel

    settings = {"use_safetensors": True, "dtype": torch.float32} if issubclass(kind, PreTrainedModel) else {}
    try:
        return kind.from_pretrained(name, **settings)
    except Exception as error:  # the Hub client raises a dozen types for "not there"
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InterpError(
            f"cannot load the {what} model {name!r} ({first}); name another by {option}, a Hub id or a folder"
        ) from error

"""Similarity of pictures to those of the baseline: the cosine of CLIP's picture vectors, the paper's CLIPScore(Image)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from interp.errors import InterpError
from interp.stores import Run

NAME = "clip_image:baseline"


def score_similarity(run: Run, clip_model: str | None = None) -> None:
    """Write the score `clip_image:baseline`: the cosine with the picture of the same prompt and seed under `baseline`."""
    vectors = _vectors(run, clip_model)
    table = run.samples
    done = table["status"].to_numpy() == 1
    rows = np.flatnonzero(((table["condition"] == "baseline") & done).to_numpy())
    keys = list(zip(table["prompt_id"], table["seed"], strict=True))
    where = {keys[i]: i for i in rows}
    values = np.full(len(run), np.nan, "float32")
    images = run.tree["images"].to_dataset()["image"]
    found = np.concatenate([
        vectors(np.asarray(images.isel(sample=slice(k, k + 256)).values)) for k in range(0, len(run), 256)
    ])  # fmt: skip
    for i, key in enumerate(keys):
        if done[i] and key in where:
            values[i] = float(found[i] @ found[where[key]])
    run.write_scores({NAME: values})


def _vectors(run: Run, clip_model: str | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return images uint8 (n, height, width, rgb) → unit vectors (n, feature)."""
    if clip_model is None and dict(run.attrs.get("pipeline") or {}).get("id") == "scenes":
        from interp.scenes import folder
        from interp.scenes.scoring import Scorer, to_tensor

        scorer = Scorer.of(folder())
        return lambda images: scorer.picture_vectors(to_tensor(images)).cpu().numpy()
    import torch
    from transformers import CLIPModel, CLIPProcessor

    from interp.scoring import CLIP_MODEL

    name = clip_model or CLIP_MODEL
    try:
        model: Any = CLIPModel.from_pretrained(name).eval()
        processor: Any = CLIPProcessor.from_pretrained(name)
    except Exception as error:
        raise InterpError(f"cannot load the CLIP model {name!r}; name another by --clip-model") from error

    @torch.no_grad()
    def of(images: np.ndarray) -> np.ndarray:
        inputs = processor(images=list(images), return_tensors="pt")
        found = model.get_image_features(**inputs)
        found = getattr(found, "pooler_output", found)
        return torch.nn.functional.normalize(found, dim=-1).numpy()

    return of

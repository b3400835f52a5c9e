"""The Fréchet distance of a condition's pictures from the reference's, as a whole, in features of Inception or of CLIP."""

from typing import Any

import numpy as np
import torch

from interp.errors import InterpError
from interp.scoring.clip import Encoder, encoder
from interp.scoring.pixels import needing, torchmetrics
from interp.stores import Run

LAYERS = (64, 192, 768, 2048)  # of Inception-v3, by their numbers of features


class Fid:
    """Fréchet distance (FID, arXiv:1706.08500) of a condition's pictures from the reference's, by torchmetrics.

    One number a condition, 0 and more: it is not in `/scores` by sample but in the attributes of that node. It is biased
    upwards for few pictures, so that only values of equally many compare, and says little below some thousands.

    Option `features`: 64, 192, 768 or 2048 (default) for a layer of Inception-v3, which needs the package torch-fidelity
    and its weights, fetched on first use; or, in Python, a torch module of your own: uint8 (sample, rgb, y, x) →
    (sample, feature), its number of features in `num_features`.
    """

    def __init__(self, *, features: int | torch.nn.Module = 2048, device: str = "cpu") -> None:
        if isinstance(features, int) and features not in LAYERS:
            raise InterpError(f"fid: features={features} is not possible; it is one of {', '.join(map(str, LAYERS))}")
        kind = torchmetrics("fid").image.fid.FrechetInceptionDistance
        with needing("fid", "the package torch-fidelity and the Inception weights that it downloads"):
            self.metric: Any = kind(feature=features, normalize=False).to(device)
        self.device, self.count = device, 0

    @torch.no_grad()
    def update(self, images: np.ndarray, references: np.ndarray) -> None:
        """Add pictures and their references."""
        for pictures, real in ((images, False), (references, True)):
            shown = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device).permute(0, 3, 1, 2)
            self.metric.update(shown, real=real)
        self.count += len(images)

    def compute(self) -> float:
        """Return the distance; InterpError for fewer than two pictures."""
        if self.count < 2:
            raise InterpError(f"fid needs two pictures or more of a condition, found {self.count}")
        return float(self.metric.compute())


class ClipFid(Fid):
    """Fréchet distance of a condition's pictures from the reference's, in CLIP's features, by torchmetrics.

    Features are the unit vectors of CLIP's image projection (`scenes` has 128 numbers, ViT-B/32 512); the distances do not
    compare with those of Inception (on CLIP for this: Kynkäänniemi et al., arXiv:2203.06026). One number a condition, 0 and
    more, biased upwards for few pictures. Needs the extra `[metrics]`.

    Option `clip_model` as for `clip`.
    """

    def __init__(self, *, clip_model: str | None = None, run: Run | None = None, device: str = "cpu") -> None:
        super().__init__(features=_Clip(encoder(clip_model, run, device)), device=device)


class _Clip(torch.nn.Module):
    """CLIP's picture vectors as torchmetrics asks for features: uint8 (sample, rgb, y, x) → (sample, feature)."""

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model, self.num_features = model, model.features

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.pictures(pictures.permute(0, 2, 3, 1).cpu().numpy())
        return found

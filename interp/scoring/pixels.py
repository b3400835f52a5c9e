"""Distances of a picture from its reference: pixels, structure, and features of a network."""

from typing import Any

import numpy as np
import torch

from interp.errors import InterpError

NETWORKS = ("alex", "vgg", "squeeze")


def l1(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the pixels from the reference's, as a share of their full range 0…255 (0 to 1).

    >>> l1(np.full((1, 2, 2, 3), 255, "uint8"), np.zeros((1, 2, 2, 3), "uint8")).tolist()
    [1.0]
    """
    return np.abs(images.astype("float32") - references.astype("float32")).mean((1, 2, 3)) / 255


def ssim(images: np.ndarray, references: np.ndarray, *, device: str = "cpu") -> torch.Tensor:
    """Structural similarity to the reference (Wang et al. 2004), −1 to 1, on RGB of range 1, by torchmetrics.

    Gaussian window of 11 pixels, σ 1.5, as in the paper; the picture is mirrored at its border; mean over the channels.
    Needs the extra `[metrics]`.
    """
    functional = torchmetrics("ssim").functional.image
    shown, wanted = (as_tensor(p, device) for p in (images, references))
    if min(shown.shape[-2:]) < 11:
        raise InterpError(f"ssim needs pictures of at least 11 × 11 pixels, not {shown.shape[-2]} × {shown.shape[-1]}")
    found: torch.Tensor = functional.structural_similarity_index_measure(
        shown, wanted, data_range=1.0, reduction="none"
    )
    return found.reshape(len(images))


class Lpips:
    """Learned perceptual distance from the reference (LPIPS, arXiv:1801.03924), 0 and more, by torchmetrics.

    Option `network`: "alex" (default), "vgg" or "squeeze". Needs the extra `[metrics]` and torchvision, which fetches
    the network's weights on first use.
    """

    def __init__(self, *, network: str = "alex", device: str = "cpu") -> None:
        if network not in NETWORKS:
            raise InterpError(f"lpips: network={network!r} is not possible; it is one of {', '.join(NETWORKS)}")
        image = torchmetrics("lpips").image
        with needing("lpips", "torchvision and the weights that it downloads"):
            metric = image.lpip.LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True)
        self.device, self.net = device, metric.net.to(device).eval()

    @torch.no_grad()
    def __call__(self, images: np.ndarray, references: np.ndarray) -> torch.Tensor:
        """Return the distance of each picture from its reference (sample,)."""
        shown, wanted = (as_tensor(p, self.device) for p in (images, references))
        found: torch.Tensor = self.net(shown, wanted, normalize=True)
        return found.reshape(len(images))


def as_tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """Turn uint8 pictures (sample, height, width, rgb) into float32 (sample, rgb, y, x) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


def torchmetrics(metric: str) -> Any:
    """Return the package torchmetrics with its image metrics; InterpError if it is not installed."""
    with needing(metric, "the package torchmetrics: pip install 'interp-diffusion[metrics]'"):
        import torchmetrics
        import torchmetrics.functional.image
        import torchmetrics.image
        import torchmetrics.image.fid
        import torchmetrics.image.lpip
    return torchmetrics


class needing:  # noqa: N801 - a context manager, read as a word
    """Turn whatever a library raises about what is missing into one sentence."""

    def __init__(self, metric: str, what: str) -> None:
        self.metric, self.what = metric, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, InterpError):
            first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise InterpError(f"{self.metric} needs {self.what} ({first})") from error

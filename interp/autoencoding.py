"""Pictures to latents and back, through a pipeline's own autoencoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from interp.errors import InterpError


@torch.no_grad()
def to_latents(pipe: Any, pictures: np.ndarray) -> torch.Tensor:
    """Return clean latents (sample, channel, y, x), scaled as the denoiser knows them: the mode, nothing is drawn.

    Args:
        pipe: A pipeline with a `vae`.
        pictures: uint8 (sample, height, width, rgb).

    Raises:
        InterpError: the pipeline has no autoencoder that is understood here.
    """
    vae = _autoencoder(pipe)
    values = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with _exact(vae):
        given = values.to(device=_device(pipe), dtype=vae.dtype)
        out = vae.encode(given.unsqueeze(2) if _of_video(vae) else given)
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent
    latents = (latents.squeeze(2) if _of_video(vae) else latents).float()
    shift, scale = _affine(vae, latents)
    return (latents - shift) / scale


@torch.no_grad()
def to_pictures(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    """Decode latents (sample, channel, y, x) as the pipeline does: uint8 (sample, height, width, rgb)."""
    vae = _autoencoder(pipe)
    latents = latents.to(_device(pipe))
    shift, scale = _affine(vae, latents)
    latents = latents * scale + shift
    with _exact(vae):
        given = latents.to(vae.dtype)
        decoded = vae.decode(given.unsqueeze(2) if _of_video(vae) else given, return_dict=False)[0]
    decoded = decoded.squeeze(2) if decoded.ndim == 5 else decoded
    values = (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return (values * 255).round().astype("uint8")


def _autoencoder(pipe: Any) -> Any:
    vae = getattr(pipe, "vae", None)
    config = getattr(vae, "config", None)
    known = getattr(config, "scaling_factor", None) is not None or getattr(config, "latents_std", None) is not None
    if vae is None or not (known or hasattr(vae, "bn")):
        raise InterpError(
            f"{type(pipe).__name__} has no autoencoder whose latents are understood here (a `vae` with a scaling_factor or "
            "latents_std in its config, or a batch norm), so pictures cannot be encoded or decoded"
        )
    return vae


def _affine(vae: Any, like: torch.Tensor) -> tuple[Any, Any]:
    """Return shift and scale: the autoencoder's latents are `scale · (the denoiser's) + shift`."""
    if hasattr(vae, "bn"):  # FLUX.2 normalises patches of 2×2, each position within them for itself
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        mean, std = (_tiled(values.to(like), like.shape[-2:]) for values in (vae.bn.running_mean, std))
        return mean, std
    scaling, config = getattr(vae.config, "scaling_factor", None) or 1.0, vae.config
    if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
        return getattr(config, "shift_factor", None) or 0.0, 1 / scaling
    mean, std = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, std / scaling


def _tiled(patch: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Repeat values (channel·2·2) over a picture: (1, channel, y, x)."""
    return patch.view(1, -1, 2, 2).repeat(1, 1, size[0] // 2, size[1] // 2)


def _of_video(vae: Any) -> bool:
    """Autoencoders of video take a picture as a video of one frame (Qwen-Image, Wan)."""
    return any(isinstance(m, torch.nn.Conv3d) for m in vae.modules())


def _device(pipe: Any) -> torch.device:
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


@contextmanager
def _exact(vae: Any) -> Iterator[None]:
    """Autoencoders that overflow in half precision (XL) say so; lend them float32, as pipelines do."""
    own = vae.dtype
    if own != torch.float16 or not getattr(vae.config, "force_upcast", False):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(own)

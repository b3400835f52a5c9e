"""Adding to activations at a site: a vector, or noise. What is added adds up, so nothing is claimed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import numpy as np
import torch

from interp.errors import InterpError
from interp.hooks import At, HookRegistry
from interp.interventions.at_site import AtSite, Change
from interp.interventions.base import is_number
from interp.interventions.places import Place, present
from interp.interventions.vectors import Vector, kept_vector, read_vector


@dataclass(frozen=True, repr=False)
class Steer(AtSite):
    """Add a vector to what passes at a site: `x + coefficient · vector` (activation steering).

    Args:
        site: A site or glob `path:in` or `path:out`.
        vector: Numbers, one a channel; a one-dimensional array; or the path of a `.npy` or `.safetensors` file that
            holds one array, of the channels or of one sample's whole tensor. `interp.interventions.steering_vector`
            makes one from a run.
        coefficient: Its factor; 0 changes nothing, to the last bit.
        branch, tokens, region, mask, channels: The part that is changed; see `AtSite`.
        start, stop, unit: The window of steps.

    Several add up, in order. Source: Turner et al., arXiv:2308.10248.

    >>> Steer("unet.mid_block:out", [1.0, 0.0, -1.0], coefficient=2.0, branch="both")
    Steer(branch='both', site='unet.mid_block:out', vector=(1.0, 0.0, -1.0), coefficient=2.0)
    """

    site: str
    vector: Vector
    coefficient: float = 1.0

    name: ClassVar[str] = "steer"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "vector", kept_vector(self.vector))
        if not is_number(self.coefficient):
            raise InterpError(f"{self!r}: the coefficient is a number")

    def _claimed(self, sites: Sequence[str]) -> frozenset[str]:
        return frozenset()

    def check_place(self, place: Place) -> None:
        """The vector must fit the site."""
        vector = read_vector(self.vector)
        if place.shape is not None:
            self._shaped(vector, place.site, place.shape)

    def change(self, hooks: HookRegistry, place: Place) -> Change:
        """The tensor with the vector added."""
        vector = read_vector(self.vector)

        def add(tensor: torch.Tensor, at: At, branch: str) -> torch.Tensor | None:
            if not self.coefficient:
                return None
            added = self.coefficient * self._shaped(vector, place.site, tuple(tensor.shape[1:]))
            return tensor + added.to(tensor)

        return add

    def _shaped(self, vector: torch.Tensor, site: str, shape: tuple[int, ...]) -> torch.Tensor:
        channel = shape[1] if len(shape) == 2 else shape[0]
        if tuple(vector.shape) == shape:
            return vector
        if tuple(vector.shape) == (channel,):
            return vector.reshape(-1, 1, 1) if len(shape) == 3 else vector
        raise InterpError(
            f"Steer({site!r}): the vector has the shape {tuple(vector.shape)}, where {channel} channels pass, of one sample "
            f"{shape}"
        )


@dataclass(frozen=True, repr=False)
class AddNoise(AtSite):
    """Add Gaussian noise to what passes at a site: how causal tracing corrupts a prompt.

    Args:
        site: A site or glob `path:in` or `path:out`, e.g. the token embeddings of the text encoder.
        scale: Standard deviation of the noise, in standard deviations of the sample's own tensor there.
        seed: Of the noise. A sample's noise depends on it, on the sample's prompt row and seed, the site and the step,
            and on nothing else: conditions get the same noise, whatever runs in their batch. 0 of scale changes nothing.
        branch, tokens, region, mask, channels: The part that is changed, e.g. `tokens=("{subject}",)`; see `AtSite`.
        start, stop, unit: The window of steps.

    Source: Meng et al., arXiv:2202.05262 (3 standard deviations of the embeddings, on the subject's tokens); Basu et al.,
    arXiv:2310.13730.

    >>> AddNoise("text_encoder.embeddings:out", scale=3.0, tokens=("red circle",))
    AddNoise(tokens=('red circle',), site='text_encoder.embeddings:out', scale=3.0)
    """

    site: str
    scale: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "add_noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.scale, least=0):
            raise InterpError(f"{self!r}: the scale of the noise is a number of at least 0")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InterpError(f"{self!r}: the seed is a whole number of at least 0")

    def _claimed(self, sites: Sequence[str]) -> frozenset[str]:
        return frozenset()

    def change(self, hooks: HookRegistry, place: Place) -> Change:
        """The tensor with noise added."""
        samples = list(zip(place.batch.prompt_ids, place.batch.seeds, strict=True))
        site = crc32(place.site.encode())

        def add(tensor: torch.Tensor, at: At, branch: str) -> torch.Tensor | None:
            if not self.scale:
                return None
            return torch.stack([
                x + (self.scale * x.std()) * _noise((self.seed, *key, site, at.step + 1, at.evaluation), x)
                for x, key in zip(tensor, [samples[i] for i in present(at)], strict=True)
            ])  # fmt: skip

        return add


def _noise(key: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise of this key, the same on every device."""
    seed = int(np.random.SeedSequence([k % 2**32 for k in key]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randn(like.shape, generator=torch.Generator("cpu").manual_seed(seed)).to(like)

"""What a family knows of the pipeline's call: arguments, guidance, sizes, latents and noise levels."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from interp.errors import InterpError
from interp.families.described import Described
from interp.families.facts import Arguments


class CallFacts(Described):
    """*arguments* are those of the pipeline's call (`height`, `guidance_scale`, …), defaults filled in."""

    guidance_argument: ClassVar[str] = "guidance_scale"
    """The pipeline's argument that a run's guidance scale is given as."""
    needs_negative: ClassVar[bool] = False
    """The pipeline has no guidance unless it is given a negative prompt, be it empty."""
    multiple: int = 8
    """Both sides of a picture are multiples of this many pixels."""

    # Arguments

    def arguments(self, given: Arguments | None = None) -> dict[str, Any]:
        """Return the arguments of a pipeline call: those given, defaults for the rest."""
        signature = inspect.signature(type(self.pipe).__call__)
        defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
        return {**defaults, **{n: v for n, v in (given or {}).items() if v is not None}}

    def run_arguments(
        self, guidance_scale: float, negative_prompts: Sequence[str], options: Arguments, any_negative: bool
    ) -> dict[str, Any]:
        """Return the arguments with which a run asks for guidance and negative prompts; `options` are the user's own.

        any_negative: some sample of the run has a negative prompt. Some pipelines treat "" and none differently (XL
        zeroes the states), so this is decided for the run as a whole: a sample must not depend on its batch.
        """
        asked: dict[str, Any] = {self.guidance_argument: guidance_scale, **options}
        if any_negative and not self.takes_negative:
            raise InterpError(f"{type(self.pipe).__name__} takes no negative prompt; leave it out")
        negative = {"negative_prompt": list(negative_prompts)}
        wanted = any_negative or self.needs_negative
        return {**asked, **negative} if wanted and self.guided(self.arguments({**asked, **negative})) else asked

    @property
    def takes_negative(self) -> bool:
        """Whether the pipeline's call takes a negative prompt; if not, the branch without text reads an empty one."""
        return "negative_prompt" in inspect.signature(type(self.pipe).__call__).parameters

    @property
    def needs_picture(self) -> bool:
        """Whether the pipeline's call must be given a picture beside the prompt."""
        return False

    def check_call(self, arguments: Arguments) -> None:
        """Refuse a call that cannot be recorded as it is.

        Raises:
            InterpError: what it is, and what to do instead.
        """

    def check_changes(self, arguments: Arguments) -> None:
        """Refuse interventions of a call that cannot carry any."""

    def call_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a run's call as the pipeline takes them."""
        return dict(given)

    # Guidance

    def asked_guidance(self, arguments: Arguments) -> float:
        """The scale w of u + w·(c − u) that a call asks for; 1 for none."""
        return float(arguments.get(self.guidance_argument) or 1)

    def applied_guidance(self, arguments: Arguments) -> float:
        """The scale w of u + w·(c − u) that both branches are combined with."""
        return self.asked_guidance(arguments)

    def guided(self, arguments: Arguments) -> bool:
        """Tell whether a call with these arguments evaluates the branch without text."""
        given = (arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
        return self.asked_guidance(arguments) > 1 and (not self.needs_negative or any(given))

    def combine(
        self, uncond: torch.Tensor, cond: torch.Tensor, scale: float, arguments: Arguments | None = None
    ) -> torch.Tensor:
        """What the pipeline makes of both predictions, (sample, channel, y, x).

        With `guidance_rescale` φ the result is mixed with itself at the deviation of the branch with text (2305.08891).
        arguments: of the pipeline's call; None, its defaults.
        """
        guided = uncond + scale * (cond - uncond)
        mixed = float((arguments or {}).get("guidance_rescale") or 0)
        if mixed <= 0:
            return guided
        wanted, own = (x.std(dim=(1, 2, 3), keepdim=True) for x in (cond, guided))
        return mixed * guided * (wanted / own) + (1 - mixed) * guided

    # Sizes and latents

    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a call that names no size."""
        size = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return size, size

    def picture_size(self, arguments: Arguments) -> tuple[int, int]:
        """(height, width) in pixels of the picture that the call returns."""
        default = self.default_size()
        return int(arguments.get("height") or default[0]), int(arguments.get("width") or default[1])

    def size(self, arguments: Arguments) -> tuple[int, int]:
        """(height, width) in pixels of what is generated; some pipelines resize it afterwards."""
        return self.picture_size(arguments)

    def latent_shape(self, arguments: Arguments) -> tuple[int, int, int]:
        """(channel, y, x) of the latents, unpacked: by default one latent position per `vae_scale_factor`² pixels."""
        scale, (height, width) = self.pipe.vae_scale_factor, self.size(arguments)
        return self.denoiser.config.in_channels, height // scale, width // scale

    def unpack(self, latents: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """Turn what the scheduler handles into (rows, channel, y, x)."""
        return latents

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn (rows, channel, y, x) into what the scheduler handles: the inverse of `unpack`."""
        return latents

    def given_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn (rows, channel, y, x) into what the pipeline's call takes as `latents=`."""
        return self.pack(latents)

    def returned_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn the last (rows, channel, y, x) into what the pipeline returns for `output_type="latent"`."""
        return self.pack(latents)

    # Steps

    def schedule(self, arguments: Arguments) -> dict[str, Any]:
        """Return what the pipeline passes to `scheduler.set_timesteps` beside the number of steps."""
        return {}

    def skipped_steps(self, arguments: Arguments) -> int:
        """Steps that the pipeline leaves out at the beginning, because it starts from a picture.

        Raises:
            InterpError: the pipeline starts from a picture in a way that is unknown.
        """
        if arguments.get("strength") is not None:
            raise InterpError(
                f"recording follows whole sampling runs of a {type(self.pipe).__name__}; starting from a picture (strength=…) "
                "is not supported for it"
            )
        return 0

    def next_latents(self, out: Any, arguments: Arguments) -> torch.Tensor:
        """Return what the pipeline goes on with from the result of `scheduler.step`."""
        return out[0] if isinstance(out, tuple) else out.prev_sample

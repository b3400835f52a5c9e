"""Pipelines around a transformer that no other family describes: what can be recorded without knowing them."""

import inspect
import re
from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any, ClassVar

import torch

from interp.branches import keep_rows
from interp.errors import InterpError
from interp.families.base import Family
from interp.families.facts import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt, Pass
from interp.families.glance import glance
from interp.overriding import own_class
from interp.tokens import Tokens


class UnknownTransformerFamily(Family):
    """Latents, predictions, pictures and module sites of any pipeline that calls `pipe.transformer`.

    Attention is not kept, nor text changed, since where the text lies is unknown. A branch is named by `cache_context`,
    where the pipeline opens it, or by there being one alone, where guidance is off. Otherwise branches have numbers in
    the order of rows and calls (`#0`, `#1`), and a recording finds their names from the arithmetic of each step: of two
    predictions a and b, the scheduler got u + w·(c − u) with w > 1 for one assignment alone.
    """

    name = "unknown"
    fallback: ClassVar[bool] = True
    sequential: ClassVar[bool] = True

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        """Whatever has a transformer and a scheduler."""
        return isinstance(getattr(pipe, "transformer", None), torch.nn.Module) and hasattr(pipe, "scheduler")

    @property
    def _described(self) -> str:
        return f"no model family describes a {type(self.pipe).__name__}"

    def _text_unknown(self) -> InterpError:
        return InterpError(
            f"{self._described}, so where its text lies is unknown: text states are neither recorded nor exchanged; a family "
            "for it can be added through the entry-point group 'interp.families'"
        )

    # What it cannot give

    def attention_sites(self) -> list[AttentionSite]:
        """None: the text cannot be told from the image."""
        return []

    def without_probabilities(self) -> dict[str, str]:
        """Everything that looks like attention, and the transformer itself."""
        why = f"{self._described}, so where text and image lie in its attention is unknown"
        looks = [n for n, m in self.denoiser.named_modules() if n and re.search("(?i)attention|attn", type(m).__name__)]
        return dict.fromkeys(["transformer", *(f"transformer.{name}" for name in looks)], why)

    def text_length(self, arguments: Arguments | None = None) -> int:
        """No position is known."""
        return 0

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """No token is known."""
        return Tokens([], [], [], [], prompt.split(), 0)

    def text_segments(self, arguments: Arguments | None = None) -> dict[str, slice]:
        """No encoder's positions are known."""
        return {}

    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Refused."""
        raise self._text_unknown()

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """Refused."""
        raise self._text_unknown()

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Refused."""
        raise self._text_unknown()

    def check_changes(self, arguments: Arguments) -> None:
        """An intervention acts on a named branch, which must be known before anything runs."""
        if self.guided(arguments) and not self._names_branches:
            raise InterpError(
                f"{self._described}, and the pipeline does not name its branches, so interventions need guidance off "
                f"({self.guidance_argument}=1); interp.HookRegistry reads and writes without"
            )

    @property
    def _names_branches(self) -> bool:
        try:
            source = inspect.getsource(own_class(self.pipe).__call__)
        except (OSError, TypeError):
            return False
        return 'cache_context("cond")' in source.replace("'", '"')

    # The pipeline's call

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(own_class(self.pipe).__call__).parameters

    @property
    def guidance_argument(self) -> str:  # type: ignore[override]
        """`true_cfg_scale`, where there is one: then `guidance_scale` is an input of the model."""
        return "true_cfg_scale" if "true_cfg_scale" in self._parameters else "guidance_scale"

    def call_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Without arguments that the pipeline has not."""
        if any(p.kind is p.VAR_KEYWORD for p in self._parameters.values()):
            return dict(given)
        return {name: value for name, value in given.items() if name in self._parameters}

    def guided(self, arguments: Arguments) -> bool:
        """As far as can be told before: a scale above 1, in a pipeline that has one."""
        return self.guidance_argument in self._parameters and super().guided(arguments)

    def default_size(self) -> tuple[int, int]:
        """What the call's signature, the pipeline or the transformer says."""
        given, scale = self.arguments(), getattr(self.pipe, "vae_scale_factor", 8)
        if given.get("height") and given.get("width"):
            return int(given["height"]), int(given["width"])
        size = getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.get("sample_size")
        if not isinstance(size, int):
            raise InterpError(f"{self._described}, and its default size is unknown; give height and width")
        return size * scale, size * scale

    def latent_shape(self, arguments: Arguments) -> tuple[int, int, int]:
        """As the transformer is given them; packed latents (position, feature) count as (feature, position, 1)."""
        first = self._first_input(arguments)
        if first.ndim == 3:
            return int(first.shape[2]), int(first.shape[1]), 1
        if first.ndim == 4:
            return int(first.shape[1]), int(first.shape[2]), int(first.shape[3])
        raise InterpError(
            f"{self._described}, and its transformer is given a tensor of shape {tuple(first.shape)}, which is neither a "
            "picture of latents nor packed; use interp.HookRegistry"
        )

    def _first_input(self, arguments: Arguments) -> torch.Tensor:
        seen = glance(self.pipe, self.denoiser, arguments)
        first = seen.args[0] if seen.args else seen.kwargs.get("hidden_states", seen.kwargs.get("sample"))
        if not isinstance(first, torch.Tensor):
            raise InterpError(
                f"{self._described}, and its transformer is given a {type(first).__name__} for latents; use interp.HookRegistry"
            )
        return first

    def unpack(self, latents: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """Packed latents become (rows, feature, position, 1)."""
        return latents.transpose(1, 2)[..., None] if latents.ndim == 3 else latents

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """As they are."""
        return latents

    def schedule(self, arguments: Arguments) -> dict[str, Any]:
        """What a glance at the call saw."""
        return dict(glance(self.pipe, self.denoiser, arguments).schedule)

    # One denoiser call

    def branches(self, call: Pass) -> tuple[str, ...]:
        """As `cache_context` names the call; ("cond",) where guidance is off; else numbers."""
        if call.context in ("cond", "uncond"):
            return (call.context,)
        rows, samples = self.rows(call.args, call.kwargs), self._samples(call.arguments)
        parts = rows // samples if samples and rows % samples == 0 else 1
        if parts == 1 and self._unguided(call.arguments):
            return ("cond",)
        return tuple(f"#{call.index * parts + i}" for i in range(parts))

    def _samples(self, arguments: Arguments | None) -> int:
        prompt = (arguments or {}).get("prompt")
        prompts = len(prompt) if isinstance(prompt, (list, tuple)) else int(prompt is not None)
        return prompts * int((arguments or {}).get("num_images_per_prompt") or 1)

    def _unguided(self, arguments: Arguments | None) -> bool:
        """Whether the pipeline says that there is no guidance: by its property, or by having no scale, or one of at most 1."""
        try:
            return not self.pipe.do_classifier_free_guidance
        except AttributeError:
            return arguments is not None and not self.guided(arguments)

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The scheduler's own."""

    def output_rows(self, out: Any) -> torch.Tensor:
        """A tensor, or the first of what is given."""
        if isinstance(out, torch.Tensor):
            return out
        return next(iter(out.values())) if isinstance(out, Mapping) else out[0]

    def with_rows(self, out: Any, rows: torch.Tensor, kwargs: Mapping[str, Any]) -> Any:
        """In the form that it has; of a call that was not run, in the one that the transformer's signature tells."""
        bare = out is None and "return_dict" not in inspect.signature(type(self.denoiser).forward).parameters
        if bare or isinstance(out, torch.Tensor):
            return rows
        if isinstance(out, list):
            return [rows, *out[1:]]
        if isinstance(out, MutableMapping):
            changed = copy(out)
            changed[next(iter(out))] = rows
            return changed
        return super().with_rows(out, rows, kwargs)

    def prediction(self, out: Any, arguments: Arguments) -> torch.Tensor:
        """As the transformer gives it."""
        return self.unpack(self.output_rows(out), arguments)

    def name_branches(self, outputs: Mapping[str, torch.Tensor], model_output: torch.Tensor) -> dict[str, str]:
        """Find the names of numbered branches from what the scheduler got of them."""
        found = _assigned(list(outputs.values()), model_output)
        if found is None:
            raise InterpError(
                f"{self._described}, and what its {len(outputs)} predictions of a step become does not tell which is with "
                f"text; call it without guidance ({self.guidance_argument}=1), or keep neither noise_pred nor sites"
            )
        return dict(zip(outputs, found, strict=True))

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row of what a glance at the call saw."""
        seen = glance(self.pipe, self.denoiser, arguments)
        rows = self.rows(seen.args, seen.kwargs)
        args, kwargs = keep_rows((seen.args, dict(seen.kwargs)), rows, [0])
        return DenoiserInputs(args, kwargs)


def _assigned(outputs: Sequence[torch.Tensor], given: torch.Tensor) -> tuple[str, ...] | None:
    """Name one or two predictions, of which the scheduler was given ±(u + w·(c − u)), w > 1; None if that is not so."""
    if any(o.shape != given.shape for o in outputs) or not 1 <= len(outputs) <= 2:
        return None
    want = given.double()
    a, *rest = (o.double() for o in outputs)
    size = want.norm()
    if not rest:
        return ("cond",) if min((want - a).norm(), (want + a).norm()) <= 0.02 * size else None
    d = rest[0] - a
    fits = []
    for sign in (1, -1):
        off = sign * want - a
        share = float((off * d).sum() / (d * d).sum().clamp(min=1e-30))
        miss = float((off - share * d).norm() / (d.norm() * max(1.0, abs(share))).clamp(min=1e-30))
        fits.append((miss, share))
    miss, share = min(fits)
    if miss > 0.05 or -1e-3 <= share <= 1 + 1e-3:
        return None
    return ("uncond", "cond") if share > 1 else ("cond", "uncond")

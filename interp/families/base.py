"""What a model family knows: where attention is, in which order branches come, how a prompt becomes tokens.

A family is a class that names its pipelines, found through the entry-point group `interp.families`. Most methods have an
answer that fits most pipelines; `docs/families.md` tells how one is added.

Two dictionaries come up everywhere. *arguments* are those of the pipeline's call (`height`, `guidance_scale`, …),
defaults filled in; *kwargs* are those of one denoiser call inside it.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from interp.branches import keep_rows
from interp.errors import InterpError
from interp.families.calling import CallFacts
from interp.families.facts import Arguments, AttentionSite, DenoiserInputs, Pass, Spans
from interp.families.reading import TextFacts
from interp.undressing import undressed


class Family(CallFacts, TextFacts):
    """The facts about one pipeline object. Subclass it, and name the class in the group `interp.families`."""

    name: ClassVar[str]
    pipelines: ClassVar[frozenset[str]] = frozenset()
    """Names of the pipeline classes that it describes."""
    sequential: ClassVar[bool] = False
    """Guidance calls the denoiser once per branch; otherwise branches are rows of one call."""
    shared: ClassVar[frozenset[str]] = frozenset()
    """Denoiser arguments that all rows share (rotary tables and the like): dropping a branch leaves them alone."""
    image_lies: ClassVar[Literal["first", "last"]] = "last"
    """Where the image lies in sequences that hold the text too."""
    fallback: ClassVar[bool] = False
    """Chosen only if no other family matches."""
    attention: ClassVar[tuple[type[torch.nn.Module], ...]] = (Attention,)
    """Classes of attention modules."""
    text_first_blocks: ClassVar[frozenset[str]] = frozenset()
    """The denoiser's lists of blocks of two streams that give (text, image)."""

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        """Tell whether this family describes `pipe`: by the name of its class, or of a base, since users subclass."""
        return any(c.__name__ in cls.pipelines for c in type(pipe).__mro__)

    # Attention

    def attention_kind(self, path: str, module: Any) -> str | None:
        """`cross`, `self`, `joint` or `text`; None for a module that is no attention site. `path` is within the denoiser."""
        return "cross" if module.is_cross_attention else "self"

    def attention_sites(self) -> list[AttentionSite]:
        """All attention modules of the denoiser, in the order in which they run, without grids."""
        found: list[AttentionSite] = []
        for path, module in self.denoiser.named_modules():
            kind = self.attention_kind(path, module) if isinstance(module, self.attention) else None
            if kind is not None:
                found.append(AttentionSite(f"{self.root}.{path}", module, kind, int(module.heads)))
        return found

    def without_probabilities(self) -> dict[str, str]:
        """Attention modules whose probabilities are not kept, by name → why, as a sentence without its full stop."""
        return {}

    def output_index(self, path: str) -> int:
        """Which element of a module's tuple output is the image's; blocks of two streams often give the text first."""
        return int(path.rpartition(".")[0].removeprefix(f"{self.root}.") in self.text_first_blocks)

    def grid(self, arguments: Arguments) -> tuple[int, int] | None:
        """(height, width) of the image positions, equal at all attention sites; None if the dry run is to find them."""
        return None

    def joint_length(self, arguments: Arguments) -> int:
        """Positions of a joint attention: text and image."""
        grid = self.grid(arguments)
        assert grid is not None
        return grid[0] * grid[1] + self.text_length(arguments)

    def spans(self, site: AttentionSite, queries: int, keys: int, kwargs: Mapping[str, Any]) -> Spans:
        """Return where image and text lie in a kernel call of so many queries and keys, within this denoiser call."""
        if site.kind == "cross":
            return Spans(image_queries=slice(0, queries), text_keys=slice(0, keys))
        if site.kind == "self":
            return Spans(image_queries=slice(0, queries), image_keys=slice(0, keys))
        if site.kind == "text":
            return Spans(text_queries=slice(0, queries), text_keys=slice(0, keys))
        raise NotImplementedError(f"{type(self).__name__} has joint attention and must say where its text lies")

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """A context for denoiser calls on tensors without data: no hook of others meets them, and nothing is left of them."""
        with undressed(self.denoiser):
            yield

    @abstractmethod
    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """Inputs of one denoiser call with one row, made within the caller's (fake) tensor mode."""

    # What goes into a denoiser call

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give arguments of a denoiser call their names, where the pipeline passes by position what is asked for by name."""
        return args, kwargs

    def rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Rows of a denoiser call."""
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        return int(first.shape[0])

    def branches(self, call: Pass) -> tuple[str, ...]:
        """Branches of a denoiser call in row order, e.g. ("uncond", "cond"); () for a call that is of no branch."""
        if self.sequential:
            if call.context in ("cond", "uncond"):
                return (call.context,)
            raise InterpError(
                f"{type(self.pipe).__name__} called its denoiser outside of cache_context('cond') and ('uncond'), so the "
                "branch is unknown"
            )
        if call.arguments is None:
            raise InterpError(
                f"whether a running {type(self.pipe).__name__} has guidance cannot be seen from inside; enter the "
                "HookRegistry before the pipeline is called"
            )
        return ("uncond", "cond") if self.guided(call.arguments) else ("cond",)

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
        """Return the scheduler's timestep of a denoiser call, or None if the denoiser is given a changed one."""
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        return float(torch.as_tensor(time).flatten()[0])

    def keep_rows(self, inputs: DenoiserInputs, rows: int, index: Sequence[int]) -> DenoiserInputs:
        """Return the arguments of a denoiser call of so many rows with those of these numbers alone."""
        held = {name: value for name, value in inputs.kwargs.items() if name in self.shared}
        args, kwargs = keep_rows((inputs.args, inputs.kwargs), rows, index)
        return DenoiserInputs(args, {**kwargs, **held})

    # What comes out of it

    def name_branches(self, outputs: Mapping[str, torch.Tensor], model_output: torch.Tensor) -> dict[str, str]:
        """Name branches that have numbers alone, by what `scheduler.step` was given of their predictions."""
        raise NotImplementedError(f"{type(self).__name__} names its branches")

    def output_rows(self, out: Any) -> torch.Tensor:
        """Return the denoiser's output as it is, one tensor: (rows, …)."""
        return out[0] if isinstance(out, tuple) else out.sample

    def with_rows(self, out: Any, rows: torch.Tensor, kwargs: Mapping[str, Any]) -> Any:
        """Return the denoiser's output with other rows, the inverse of `output_rows`; `out` is None if it was not run."""
        if out is None:
            return (rows,) if kwargs.get("return_dict") is False else Transformer2DModelOutput(sample=rows)
        return (rows, *out[1:]) if isinstance(out, tuple) else type(out)(sample=rows)

    def guide(self, uncond: torch.Tensor, cond: torch.Tensor, scale: float, arguments: Arguments) -> torch.Tensor:
        """Combine both branches' outputs as they are, (rows, …), with another scale than the pipeline's own."""
        u, c = (self.unpack(x, arguments) for x in (uncond, cond))
        channels = self.latent_shape(arguments)[0]  # what follows is a learned variance
        guided = self.combine(u[:, :channels], c[:, :channels], scale, arguments)
        return self.pack(torch.cat([guided, c[:, channels:]], dim=1))

    def prediction(self, out: Any, arguments: Arguments) -> torch.Tensor:
        """Return the denoiser's output as the scheduler understands it: (rows, channel, y, x), all rows.

        A learned variance is cut off (as many channels again), and a sign that the pipeline turns is turned, so that
        u + w·(c − u) is what `scheduler.step` receives.
        """
        whole = self.unpack(out[0] if isinstance(out, tuple) else out.sample, arguments)
        return whole[:, : self.latent_shape(arguments)[0]]

    def blank_output(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return a tensor like the denoiser's output, for a call that is skipped (sequential guidance)."""
        return torch.empty_like(args[0] if args else kwargs["hidden_states"])

"""What a model family knows: where attention is, in which order branches come, how a prompt becomes tokens.

A family is a class with a `matches(pipe)` static method, found through the entry-point group `interp.families`.
Most methods have an answer that fits most pipelines; `docs/families.md` tells how one is added.

Two dictionaries come up everywhere. *arguments* are those of the pipeline's call (`height`, `guidance_scale`, …),
defaults filled in; *kwargs* are those of one denoiser call inside it.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from interp.branches import keep_rows
from interp.compiling import plain
from interp.errors import InterpError
from interp.tokens import Tokens, tokenize
from interp.undressing import undressed

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class AttentionSite:
    """One attention module: its name without quantity, e.g. `unet.mid_block.attentions.0.transformer_blocks.0.attn2`.

    kind: `cross` (image → text), `self` (image → image) or `joint` (one softmax over text and image); grid: (height,
    width) of the image positions.
    """

    name: str
    module: torch.nn.Module
    kind: str
    heads: int
    grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Spans:
    """Where image and text lie among the queries and keys of one kernel call; None where a side holds none."""

    image_queries: slice | None = None
    text_queries: slice | None = None
    image_keys: slice | None = None
    text_keys: slice | None = None

    def part(self, part: str) -> tuple[slice, slice]:
        """Return the queries and keys of `cross` (image → text), `self` (image → image) or `text` (text → image)."""
        queries = self.text_queries if part == "text" else self.image_queries
        keys = self.text_keys if part == "cross" else self.image_keys
        if queries is None or keys is None:
            raise InterpError(f"this attention has no part {part!r}: it holds {self}")
        return queries, keys


PARTS = {"cross": ("cross",), "self": ("self",), "joint": ("cross", "self", "text")}
"""Kind of a site → the parts of its probabilities that a run can keep, the first one being what a glob means."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Text states as the denoiser receives them.

    embeddings (sample, token, feature); pooled (sample, feature); mask (sample, token), 1 where a token is attended to.
    Where prompts are of different lengths and no state stands at the end of the shorter ones, embeddings are NaN there.
    """

    embeddings: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class DenoiserInputs:
    """Arguments of one denoiser call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """A denoiser call that is about to run, as a family needs it to tell the branches.

    arguments: of the pipeline's call, None if it began before the registry was entered; context: the name that the
    pipeline gave the call (`cache_context`), or None; index: denoiser calls since the last `scheduler.step`.
    """

    arguments: Arguments | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    context: str | None
    index: int


class Family(ABC):
    """The facts about one pipeline object. Subclass it, and name the class in the group `interp.families`."""

    name: ClassVar[str]
    root: ClassVar[str] = "transformer"
    """The pipeline's attribute that holds the denoiser proper."""
    sequential: ClassVar[bool] = False
    """Guidance calls the denoiser once per branch; otherwise branches are rows of one call."""
    shared: ClassVar[frozenset[str]] = frozenset()
    """Denoiser arguments that all rows share (rotary tables and the like): dropping a branch leaves them alone."""
    ragged: ClassVar[bool] = False
    """Prompts have as many text states as tokens, unlike each other."""
    text_elsewhere: ClassVar[bool] = False
    """Text reaches the denoiser by another way than attention and a pooled vector."""
    image_lies: ClassVar[Literal["first", "last"]] = "last"
    """Where the image lies in sequences that hold the text too."""
    fallback: ClassVar[bool] = False
    """Chosen only if no other family matches."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """The pipeline's argument that holds the scale w of u + w·(c − u)."""
    multiple: int = 8
    """Both sides of a picture are multiples of this many pixels."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @staticmethod
    @abstractmethod
    def matches(pipe: Any) -> bool:
        """Tell whether this family describes `pipe`."""

    # Modules

    @property
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """Modules called once per evaluation with the same rows; the first is the denoiser proper."""
        return {self.root: plain(getattr(self.pipe, self.root))}

    @property
    def denoiser(self) -> Any:
        """The denoiser proper."""
        return next(iter(self.denoisers.values()))

    @property
    def text_encoders(self) -> dict[str, tuple[Any, torch.nn.Module]]:
        """Name → (tokenizer, encoder), in the order in which the pipeline uses them."""
        found = {}
        for end in ("", "_2", "_3"):
            tokenizer, encoder = (getattr(self.pipe, f"{kind}{end}", None) for kind in ("tokenizer", "text_encoder"))
            if tokenizer is not None and encoder is not None:
                found[f"text_encoder{end}"] = (tokenizer, encoder)
        return found

    @abstractmethod
    def attention_sites(self) -> list[AttentionSite]:
        """All attention modules of the denoiser, in the order in which they run, without grids."""

    def without_probabilities(self) -> dict[str, str]:
        """Attention modules that form no probabilities, by name → why, as a sentence without its full stop."""
        return {}

    def output_index(self, path: str) -> int:
        """Which element of a module's tuple output is the image's; blocks of two streams often give the text first."""
        return 0

    # The pipeline's call

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
        if any_negative and self.guided(self.arguments({**asked, "negative_prompt": list(negative_prompts)})):
            asked["negative_prompt"] = list(negative_prompts)
        return asked

    @property
    def takes_negative(self) -> bool:
        """Whether the pipeline's call takes a negative prompt; if not, the branch without text reads an empty one."""
        return "negative_prompt" in inspect.signature(type(self.pipe).__call__).parameters

    @property
    def needs_picture(self) -> bool:
        """Whether the pipeline's call must be given a picture beside the prompt."""
        return False

    def check_call(self, arguments: Arguments) -> None:  # noqa: B027 - most calls can be recorded
        """Refuse a call that cannot be recorded as it is.

        Raises:
            InterpError: what it is, and what to do instead.
        """

    def check_changes(self, arguments: Arguments) -> None:  # noqa: B027 - most pipelines can be intervened on
        """Refuse interventions of a call that cannot carry any."""

    def call_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a run's call as the pipeline takes them."""
        return dict(given)

    def guided(self, arguments: Arguments) -> bool:
        """Tell whether a call with these arguments evaluates the branch without text."""
        return float(arguments.get(self.guidance_argument) or 1) > 1

    def applied_guidance(self, arguments: Arguments) -> float:
        """The scale w of u + w·(c − u) that both branches are combined with."""
        return float(arguments.get(self.guidance_argument) or 1)

    def combine(
        self, uncond: torch.Tensor, cond: torch.Tensor, scale: float, arguments: Arguments | None = None
    ) -> torch.Tensor:
        """What the pipeline makes of both predictions, (sample, channel, y, x); some rescale the result.

        arguments: of the pipeline's call; None, its defaults.
        """
        return uncond + scale * (cond - uncond)

    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a call that names no size."""

    def picture_size(self, arguments: Arguments) -> tuple[int, int]:
        """(height, width) in pixels of the picture that the call returns."""
        default = self.default_size()
        return int(arguments.get("height") or default[0]), int(arguments.get("width") or default[1])

    def size(self, arguments: Arguments) -> tuple[int, int]:
        """(height, width) in pixels of what is generated; some pipelines resize it afterwards."""
        return self.picture_size(arguments)

    @abstractmethod
    def latent_shape(self, arguments: Arguments) -> tuple[int, int, int]:
        """(channel, y, x) of the latents, unpacked."""

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

    # One denoiser call

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

    def name_branches(self, outputs: Mapping[str, torch.Tensor], model_output: torch.Tensor) -> dict[str, str]:
        """Name branches that have numbers alone, by what `scheduler.step` was given of their predictions."""
        raise NotImplementedError(f"{type(self).__name__} names its branches")

    def keep_rows(self, inputs: DenoiserInputs, rows: int, index: Sequence[int]) -> DenoiserInputs:
        """Return the arguments of a denoiser call of so many rows with those of these numbers alone."""
        held = {name: value for name, value in inputs.kwargs.items() if name in self.shared}
        args, kwargs = keep_rows((inputs.args, inputs.kwargs), rows, index)
        return DenoiserInputs(args, {**kwargs, **held})

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

        A learned variance is cut off, and a sign that the pipeline turns is turned, so that u + w·(c − u) is what
        `scheduler.step` receives.
        """
        return self.unpack(out[0] if isinstance(out, tuple) else out.sample, arguments)

    def blank_output(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return a tensor like the denoiser's output, for a call that is skipped (sequential guidance)."""
        return torch.empty_like(args[0] if args else kwargs["hidden_states"])

    # Attention

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
        raise NotImplementedError(f"{type(self).__name__} has joint attention and must say where its text lies")

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """A context for denoiser calls on tensors without data: no hook of others meets them, and nothing is left of them."""
        with undressed(self.denoiser):
            yield

    @abstractmethod
    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """Inputs of one denoiser call with one row, made within the caller's (fake) tensor mode."""

    # Text

    def text_length(self, arguments: Arguments | None = None) -> int:
        """Token positions of the text that the denoiser receives, at most."""
        return int(next(iter(self.text_encoders.values()))[0].model_max_length)

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """Tokenise a prompt: its positions are exactly those of the text in the denoiser's attention."""
        return tokenize(next(iter(self.text_encoders.values()))[0], prompt, self.text_length(arguments))

    def negative_arguments(self, arguments: Arguments) -> Arguments:
        """Return the arguments with which negative prompts are tokenised and encoded; some models treat them differently."""
        return arguments

    def text_segments(self, arguments: Arguments | None = None) -> dict[str, slice]:
        """Encoder → its positions in the text: encoders may follow each other (Stable Diffusion 3)."""
        return {next(iter(self.text_encoders)): slice(0, None)}

    def encoding_options(self, arguments: Arguments | None) -> dict[str, Any]:
        """What a call says about encoding, as `encode_prompt` takes it: layers of CLIP to skip, scale of a LoRA."""
        given = arguments or {}
        scaled = given.get("cross_attention_kwargs") or given.get("joint_attention_kwargs") or {}
        known = inspect.signature(self.pipe.encode_prompt).parameters
        found = {"clip_skip": given.get("clip_skip"), "lora_scale": scaled.get("scale")}
        return {name: value for name, value in found.items() if name in known and value is not None}

    @property
    def encoder_offset(self) -> int:
        """How many of the encoder's first positions are left out of the text that the denoiser reads."""
        return 0

    @abstractmethod
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode prompts exactly as the pipeline does for the branch with text."""

    @abstractmethod
    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """Read the text states out of a denoiser call's keyword arguments (all rows)."""

    def widened(self, text: EncodedPrompt, width: int) -> EncodedPrompt:
        """Return the text states with room for `width` tokens, where prompts have as many states as tokens."""
        return text

    @abstractmethod
    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Return the denoiser call's keyword arguments with other text states; the given dict is not touched."""

    def layer_text(self, text: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what cross-attention layers make their keys and values of: states, and the mask as a bias.

        The states are (row, token, feature) after the denoiser's own projection of them; the bias is (row, 1, token), 0
        where a token is attended to.
        """
        if text.mask is None:
            return text.embeddings, None
        return text.embeddings, ((1 - text.mask.to(text.embeddings.dtype)) * -10000.0)[:, None]

"""Reading an inner layer of the text encoder: the denoiser is shown what the encoder knows there (Diffusion Lens)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from interp.clock import Timeline
from interp.errors import InterpError, nearest, sentence_list
from interp.families import Arguments, Family
from interp.interventions.base import Batch, Intervention
from interp.interventions.text import Exchange, Prompts, TextChange


@dataclass(frozen=True, repr=False)
class EncoderLayer(TextChange):
    """Let only the first layers of the text encoder work: Diffusion Lens (Toker et al., arXiv:2403.05846).

    The later layers pass their input on, so that everything after them is the model's own: the final norm, the
    projection, the pooled vector. A pipeline that reads the state before the last layer, without the final norm (Stable
    Diffusion XL, the CLIP encoders of 3, `clip_skip`), is given the inner state without that norm too, as it was trained
    to read it; of an encoder with n layers, `layer` n − 1 and n then differ in the pooled vector alone.

    Args:
        layer: How many layers work, from 0 (token and position embeddings) to all of them, which changes nothing.
        encoders: Which encoders, e.g. `("text_encoder_2",)`; default all. They may differ in depth.
        pooled: `"replace"` (default) also makes the pooled vector from that layer; `"keep"`, `"only"` as elsewhere.

    >>> EncoderLayer(2)
    EncoderLayer(layer=2)
    """

    layer: int
    encoders: tuple[str, ...] | None = None

    name: ClassVar[str] = "encoder_layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_tuples("encoders")
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
            raise InterpError(f"{self!r}: layer is how many layers of the text encoder work, a whole number from 0")

    def tokens_claimed(self) -> frozenset[str]:
        """All text states."""
        return frozenset({"text"})

    def check_model(self, family: Family, prompts: Prompts, arguments: Arguments) -> None:
        """The encoders must exist and have so many layers."""
        super().check_model(family, prompts, arguments)
        self._silent(family)

    def check_beside(self, others: Sequence[Intervention], timeline: Timeline, family: Family) -> None:
        """An inner layer's states are computed apart, where nothing else changes the encoder."""
        mine = {*family.text_encoders} if self.encoders is None else {*self.encoders}
        for other in others if self.steps(timeline) else ():
            if mine & {name.partition(".")[0].partition(":")[0] for name in other.writes(family)}:
                raise InterpError(
                    f"{self!r} and {other!r} both decide about what a text encoder computes; give one of them, or name other "
                    "encoders"
                )

    def exchange(self, family: Family, batch: Batch) -> Exchange:
        """Encode the batch's own prompts with the later layers passing their input on."""
        with passing_on(self._silent(family)):
            encoded = family.encode([row["prompt"] for row in batch.rows], batch.arguments)
        length = encoded.embeddings.shape[1]
        return Exchange(torch.arange(length).expand(len(batch.rows), -1), lambda own: encoded)

    def _silent(self, family: Family) -> list[torch.nn.Module]:
        """The layers that only pass their input on."""
        known = {name: encoder for name, (_, encoder) in family.text_encoders.items()}
        wanted = list(known) if self.encoders is None else list(self.encoders)
        found: list[torch.nn.Module] = []
        for name in wanted:
            if name not in known:
                raise InterpError(
                    f"{self!r}: {type(family.pipe).__name__} has no text encoder {name!r}{nearest(name, known)}; it has "
                    f"{sentence_list(known)}"
                )
            layers = encoder_layers(known[name])
            if self.layer > len(layers):
                others = sentence_list([n for n in known if n != name and len(encoder_layers(known[n])) >= self.layer])
                raise InterpError(
                    f"{self!r}: {name!r} has {len(layers)} layers"
                    f"{f'; choose encoders among {others}' if others else ', so layer is at most that'}"
                )
            found += layers[self.layer :]
        return found


def encoder_layers(encoder: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the transformer layers of a text encoder, in order.

    Raises:
        InterpError: they cannot be told from other modules.
    """
    config: Any = encoder.config
    count = config.get_text_config().num_hidden_layers
    lists = {
        path: m for path, m in encoder.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count
    }  # fmt: skip
    outer = {p: m for p, m in lists.items() if not any(p.startswith(f"{q}.") for q in lists)}
    named = {
        p: m for p, m in outer.items() if p.rpartition(".")[2] in ("layers", "layer", "block") and "visual" not in p
    }
    if len(named) != 1:
        raise InterpError(
            f"the layers of a {type(encoder).__name__} cannot be told from its modules; it has lists of as many at "
            f"{sentence_list(lists) or 'no place'}"
        )
    return list(next(iter(named.values())))


@contextmanager
def passing_on(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let layers return their input, whatever they compute, within the context."""

    def pass_on(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], out: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    # before the hooks with which transformers collects hidden states
    handles = [layer.register_forward_hook(pass_on, with_kwargs=True, prepend=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

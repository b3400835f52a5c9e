"""Hidden states of the text encoders, layer by layer, as the pipeline's own encoding makes them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from interp.errors import InterpError
from interp.families import Arguments, Family
from interp.interventions.encoder import encoder_layers
from interp.stores import Group, TokenTable
from interp.stores.groups import text_group
from interp.token_columns import select_tokens
from interp.token_list import TokenList
from interp.tokens import Tokens, tokenize


def hidden_groups(
    family: Family, arguments: Arguments, prompts: Sequence[str], negatives: Sequence[str], feature: int,
    tables: dict[str, TokenTable],
) -> dict[str, Group]:  # fmt: skip
    """Return a group for every text encoder, with hidden states (sample, branch, layer, token, hidden_feature).

    `tables` are the token tables of the encoders whose states the denoiser reads (of `feature` features); others, whose
    pooled vector alone is read, or whose features lie beside another's, have no embeddings of their own.
    """
    groups = {}
    for name, (tokenizer, encoder) in family.text_encoders.items():
        table = tables.get(name)
        if table is None:
            each = [TokenList(texts, partial(encoder_tokens, tokenizer)) for texts in (prompts, negatives)]
            table = select_tokens(each[0], each[1], "all").table
        groups[f"text/{name}"] = text_group(
            len(prompts), branches=["cond", "uncond"], token=table.width, feature=feature if name in tables else None,
            hidden=len(encoder_layers(encoder)) + 1, hidden_feature=_width(encoder), tokens=table,
        )  # fmt: skip
    return groups


def encoder_tokens(tokenizer: Any, prompt: str) -> Tokens:
    """The tokens of an encoder that the denoiser does not read position by position: to its tokenizer's full length."""
    return tokenize(tokenizer, prompt)


def _width(encoder: torch.nn.Module) -> int:
    config: Any = encoder.config
    return int(config.get_text_config().hidden_size)


@torch.no_grad()
def hidden_states(family: Family, texts: list[str], arguments: Arguments) -> dict[str, torch.Tensor]:
    """Encode texts as the pipeline does; return encoder → states (text, layer, token, feature), embeddings first.

    Raises:
        InterpError: an encoder does not run once for all texts.
    """
    met: dict[str, list[torch.Tensor]] = {name: [] for name in family.text_encoders}
    handles = []
    for name, (_, encoder) in family.text_encoders.items():
        first, *_ = layers = encoder_layers(encoder)

        def enter(_: Any, args: tuple, kwargs: dict, name: str = name) -> None:
            met[name].append((args[0] if args else kwargs["hidden_states"]).detach().clone())

        def leave(_: Any, args: tuple, out: Any, name: str = name) -> None:
            met[name].append((out[0] if isinstance(out, tuple) else out).detach().clone())

        handles.append(first.register_forward_pre_hook(enter, with_kwargs=True))
        handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        family.encode(list(texts), arguments)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (_, encoder) in family.text_encoders.items():
        if len(met[name]) != len(encoder_layers(encoder)) + 1 or len(met[name][0]) != len(texts):
            raise InterpError(
                f"the pipeline does not run {name!r} once for all prompts, so its hidden states cannot be told apart; leave "
                "out text='layers'"
            )
        offset = family.encoder_offset if name in family.text_segments(arguments) else 0
        found[name] = torch.stack(met[name], 1)[:, :, offset:].float()
    return found


def fitted(states: torch.Tensor, lengths: Sequence[int], width: int) -> torch.Tensor:
    """Bring states (sample, layer, token, feature) to so many tokens, NaN behind each sample's own length."""
    more = width - states.shape[2]
    states = F.pad(states, (0, 0, 0, more), value=float("nan")) if more >= 0 else states[:, :, :width]
    behind = torch.arange(width) >= torch.tensor(list(lengths))[:, None]
    return states.cpu().masked_fill(behind[:, None, :, None], float("nan"))

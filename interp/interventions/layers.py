"""Choosing attention layers by globs and regular expressions."""

from collections.abc import Iterable, Sequence

from interp.catalog import attention_sites
from interp.errors import InterpError, nearest, sentence_list
from interp.families import PARTS, AttentionSite, Family
from interp.interventions.base import Intervention
from interp.patterns import matching


def chosen_layers(
    one: Intervention, patterns: Iterable[str], among: Sequence[AttentionSite], kind: str = "attention layer"
) -> list[AttentionSite]:
    """Return the layers that globs, `"re:…"`, `"cross"` or `"self"` select, in running order.

    Raises:
        InterpError: one of them selects nothing.
    """
    names, chosen = [s.name for s in among], set[str]()
    for pattern in patterns:
        if pattern in ("cross", "self"):
            found = [s.name for s in among if pattern in PARTS[s.kind]]
        else:
            found = matching(pattern.removesuffix(":probs"), names)
        if not found:
            raise InterpError(
                f"{one!r} matches no {kind} by {pattern!r}{nearest(pattern, [*names, 'cross', 'self'])}; this model has "
                f"{len(names)}, e.g. {sentence_list(names, 2) or 'none'}"
            )
        chosen |= {*found}
    return [s for s in among if s.name in chosen]


def chosen_cross_layers(
    one: Intervention, family: Family, patterns: Iterable[str] | None, lacking: str
) -> list[AttentionSite]:
    """Return the layers of cross-attention that are selected, all for None.

    Raises:
        InterpError: the model has none, and `lacking` says what it has; or a pattern selects none.
    """
    cross = [s for s in attention_sites(family) if s.kind == "cross"]
    if not cross:
        raise InterpError(f"{one!r}: {lacking}")
    return chosen_layers(one, patterns or ("cross",), cross, "cross-attention layer")

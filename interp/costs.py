"""What a run will cost: bytes in the store."""

from collections.abc import Mapping, Sequence

from interp.captured import SiteCapture, site_node
from interp.clock import Timeline
from interp.interventions import Intervention
from interp.stores import Layout
from interp.stores.sizes import layout_bytes


def planned_bytes(
    layout: Layout, sites: Sequence[SiteCapture], conditions: Mapping[str, Sequence[Intervention]],
    times: Timeline, kept: Sequence[int], branches: Sequence[str],
) -> dict[str, int]:  # fmt: skip
    """Return the bytes of the store's files by array, before compression; see `layout_bytes`.

    Keys and values of the text change only when the text does, and are stored once for each of its states; a branch
    that is not evaluated is stored once, as NaN.
    """
    different: dict[str, float] = {}
    for of_text in (True, False):
        each = {name: _states(changes, times, kept, branches, of_text) for name, changes in conditions.items()}
        total = sum(each[str(name)] for name in layout.samples["condition"])
        different |= {f"{site_node(s.site)}/value": total for s in sites if s.of_text == of_text}
    return layout_bytes(layout, different)


def _states(
    changes: Sequence[Intervention], times: Timeline, kept: Sequence[int], branches: Sequence[str], of_text: bool
) -> int:
    """Count what one sample has to store of its kept steps, over all branches.

    Which branches are evaluated is told by `Intervention.evaluated`, which text is read by the claims that begin with
    `text`.
    """
    windows = [(i, c, c.steps(times)) for i, c in enumerate(changes)]
    policies = [c.evaluated(times) for c in changes]
    found = 0
    for branch in branches:
        states: set[object] = set()
        for step in kept:
            active = [(i, c) for i, c, steps in windows if step in steps]
            absent = any(step in p and branch not in p[step] for p in policies)
            texts = tuple(
                i for i, c in active if branch == "cond" and any(claim.startswith("text") for claim in c.claims())
            )
            states.add("absent" if absent else texts if of_text else step)
        found += len(states)
    return found

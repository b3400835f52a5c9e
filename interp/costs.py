"""What a run will cost: bytes in the store."""

from collections.abc import Mapping, Sequence

from interp.captured import SiteCapture, site_node
from interp.clock import Timeline
from interp.interventions import Intervention
from interp.rehearsal import BESIDE, LATENTS, TEXT
from interp.stores import Layout
from interp.stores.sizes import layout_bytes

Conditions = Mapping[str, Sequence[Intervention]]


def planned_bytes(
    layout: Layout, sites: Sequence[SiteCapture], reductions: Sequence[str], conditions: Conditions, times: Timeline,
    kept: Sequence[int], branches: Sequence[str], guided: bool,
) -> dict[str, int]:  # fmt: skip
    """Return the bytes of the store's files by array, before compression; see `layout_bytes`.

    What a site repeats is stored once: what does not depend on the latents changes only when the text does, what does not
    depend on the text is equal in both branches, and a branch that is not evaluated is NaN.

    Args:
        reductions: Names of those that are kept of each step.
        kept: The steps that sites are kept of.
        guided: Whether the branch without text is evaluated at all.
    """

    def total(of: frozenset[str]) -> int:
        each = {n: _states(changes, times, kept, branches, guided, of) for n, changes in conditions.items()}
        return sum(each[str(name)] for name in layout.samples["condition"])

    different = {f"{site_node(s.site)}/value": float(total(s.of)) for s in sites}
    different |= {f"{site_node(name)}/value": float(total(frozenset({LATENTS, TEXT}))) for name in reductions}
    return layout_bytes(layout, different)


def _states(
    changes: Sequence[Intervention], times: Timeline, kept: Sequence[int], branches: Sequence[str], guided: bool,
    of: frozenset[str],
) -> int:  # fmt: skip
    """Count what one sample has to store of its kept steps and branches.

    Which branches are evaluated is told by `Intervention.evaluated`, which text is read by the claims that begin with
    `text`.
    """
    windows = [(i, c, c.steps(times)) for i, c in enumerate(changes)]
    policies = [c.evaluated(times) for c in changes]
    states: set[object] = set()
    for step in kept:
        active = [(i, c) for i, c, steps in windows if step in steps]
        for branch in branches:
            absent = (branch == "uncond" and not guided) or any(step in p and branch not in p[step] for p in policies)
            texts = tuple(
                i for i, c in active if branch == "cond" and any(claim.startswith("text") for claim in c.claims())
            )
            states.add("absent" if absent else (LATENTS in of and step, bool({TEXT, BESIDE} & of) and (branch, texts)))
    return len(states)

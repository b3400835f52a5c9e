"""What a probe needs of a run, and the sentence that says how to get what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from interp.stores.errors import InterpError, nearest

if TYPE_CHECKING:
    from interp.stores import Run

# How to obtain each node of a run, or a variable of it, when it is not there.
REMEDY = {
    "trajectory/latents": "trace again with Capture(latents=True)",
    "trajectory/final_latents": "trace again with Capture(latents=True)",
    "trajectory/noise_pred": "trace again with Capture(noise_pred=True)",
    "trajectory": "trace again with Capture(latents=True)",
    "attention": 'trace again with Capture(attention="cross")',
    "self_attention": 'trace again with Capture(attention="self")',
    "text_attention": 'trace again with Capture(attention="all")',
    "within_text_attention": 'trace again with Capture(attention="all")',
    "sites": "trace again with Capture(sites=(…,)), naming the site",
    "text": "trace again with Capture(text=True)",
    "images": "trace again with Capture(image=True)",
    "x0": "run `interp score RUN --metric x0`",
    "scores": "run `interp score RUN` with that metric",
    "samples": "add that column to the table of prompts and trace again",
}


def require(run: Run, needs: Mapping[str, Any], *, asker: str = "this analysis") -> None:
    """Raise InterpError for the first thing in `needs` that the run does not hold.

    Keys are nodes of the run: `trajectory`, `attention` (and `self_attention`, `text_attention`, `within_text_attention`),
    `sites`, `text`, `images`, `x0`, `scores`, or `samples` for the columns of the prompt table. Values are True, or the
    names wanted in that node: variables, grids (`"32x32"`), sites, encoders, metrics, columns.

    >>> from interp.stores import synthetic_run
    >>> require(synthetic_run(), {"trajectory": ["latents"], "attention": True})
    >>> require(synthetic_run(omit=("attention",)), {"attention": True}, asker="probe 'x'")
    Traceback (most recent call last):
    interp.stores.errors.InterpError: probe 'x' needs attention, which this run did not capture: trace again
    with \
Capture(attention="cross")
    """
    for node, wanted in needs.items():
        if node not in REMEDY or "/" in node:
            known = [k for k in REMEDY if "/" not in k]
            raise InterpError(f"{asker} needs {node!r}, which no run has{nearest(node, known)}")
        present = held(run, node)
        names = [] if wanted is True else [wanted] if isinstance(wanted, str) else list(wanted)
        if not present:
            what = f"{node} {', '.join(map(repr, names))}" if names else node
            verb = "has not got" if node in ("scores", "samples", "x0") else "did not capture"
            raise InterpError(f"{asker} needs {what}, which this run {verb}: {_remedy(node, names)}")
        for name in names:
            if name not in present:
                raise InterpError(
                    f"{asker} needs {name!r} in {node}, where this run has {', '.join(sorted(present))}: "
                    f"{_remedy(node, [name])}"
                )


def held(run: Run, node: str) -> set[str]:
    """Return what a run holds in a node: variables, children (grids, sites, encoders), metrics, columns."""
    tree = run.tree
    if node == "samples":
        return {str(name) for name in tree.dataset.variables if name != "sample"}
    if node not in tree.children:
        return set()
    child = tree[node]
    if node == "scores":
        return {str(m) for m in child.dataset["metric"].values} if "metric" in child.dataset else set()
    return {str(name) for name in (*child.dataset.data_vars, *child.children)}


def _remedy(node: str, names: Iterable[str]) -> str:
    return next((REMEDY[f"{node}/{n}"] for n in names if f"{node}/{n}" in REMEDY), REMEDY[node])

"""What is left of a picture when tokens' states are replaced (arXiv:2405.15330, appendices E and F)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import xarray as xr

from interp.probes.base import probe
from interp.probes.comparing import compare
from interp.probes.comparing_plot import draw_bars
from interp.probes.conditions import Spec, conditions_with, describe

if TYPE_CHECKING:
    from interp.stores import Run

EXAMPLE = (
    '{"baseline": [], "no words": [ReplaceTokens(roles=("word",), value="zero")], '
    '"no eos": [ReplaceTokens(roles=("eos", "pad"), value="zero")]}'
)


@probe("token_ablation", needs={"samples": ["condition"]}, plot=draw_bars)
def token_ablation(
    run: Run,
    *,
    reference: str = "baseline",
    conditions: Sequence[str] | str | None = None,
    metrics: Sequence[str] | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Distance (1) and scores of pictures made with some tokens' states replaced, against the unchanged ones.

    Trace an unchanged condition and several with `interp.ReplaceTokens`, all with the same prompts and seeds. The
    paper's E12: `roles=("word",)` or `roles=("eos", "pad")`, with `value="zero"` and `value="random"` ("Zero+EOS" is
    words zeroed). Its E11: all of `("word", "eos", "pad")` with `value="bos"`, and with `value="eos"`. Random vectors
    have no scale in the paper: say which one was used.

    Parameters: `reference` names the unchanged condition; `conditions` None (all that replace tokens) or some of them;
    `metrics` None (all of `/scores`) or some; `resamples` and `seed` belong to the bootstrap over prompts.

    Returns a Dataset over `condition` (the reference first) and `pair` (a prompt and seed): `image_distance` (mean
    |difference| of pixels as a share of 255), `latent_distance` (relative L2 of the final latents), `score` (condition,
    pair, metric), `passes`, each with `…_mean` and a 95 % interval `…_interval`, as far as the run holds them.
    Coordinates of the conditions: `replaced` (which tokens), `value` (by what), `changes` (everything that was done).

    Raises InterpError when the run has no such conditions. Source: Yi et al., arXiv:2405.15330, appendices E and F,
    Table 3, Figures 13 and 14.

    >>> from interp.probes.testing import changed_run
    >>> gone = {"no words": [{"name": "replace_tokens", "roles": ["word"], "value": "zero"}]}
    >>> ds = token_ablation(changed_run(gone, samples=2))
    >>> ds["replaced"].values.tolist(), ds["value"].values.tolist()
    (['', 'roles=word'], ['', 'zero'])
    """
    specs = conditions_with(run, ["replace_tokens"], conditions, asker="token_ablation", example=EXAMPLE)
    ds = compare(
        run, reference, list(specs), metrics=metrics, resamples=resamples, seed=seed, asker="token_ablation"
    )  # fmt: skip
    chosen = [_chosen(spec) for spec in specs.values()]
    values = [str(spec.get("value", "zero")) for spec in specs.values()]
    return ds.assign_coords(replaced=("condition", ["", *chosen]), value=("condition", ["", *values]))


def _chosen(spec: Spec) -> str:
    """Which tokens a spec names, in words."""
    which = {k: spec.get(k) for k in ("roles", "words", "indices", "count", "skip")}
    return describe([{"name": "", **which}])[1:-1]

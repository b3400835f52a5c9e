"""All experiments of the paper, in its order."""

from interp.errors import InterpError, nearest
from interp.reproduction import absence, attention, exchange, replaced, sides, trajectory
from interp.reproduction.experiment import Experiment
from interp.reproduction.runs import Conditions
from interp.reproduction.settings import Settings

OUT_OF_REACH = Experiment(
    "E14", "Other conditions than text", "Appendix H, Figures 17 and 18",
    "Leaving out the condition in the last a steps (up to 20) also keeps the details of AnyDoor (a picture as condition) and "
    "of PhotoMaker (text and a reference face).",
    "Not run.",
    ("Both need models of their own (AnyDoor is no diffusers pipeline; PhotoMaker needs SDXL and face weights) and "
     "are shown in the paper as pictures without numbers. With a pipeline whose condition enters by the text states, "
     "RemoveText is the paper's rule.",),
)  # fmt: skip

EXPERIMENTS: list[Experiment] = sorted(
    [
        *attention.EXPERIMENTS, *trajectory.EXPERIMENTS, *exchange.EXPERIMENTS, *absence.EXPERIMENTS, *replaced.EXPERIMENTS,
        *sides.EXPERIMENTS,
        OUT_OF_REACH,
    ],
    key=lambda e: int(e.key[1:]),
)  # fmt: skip


def chosen(only: list[str] | None) -> list[Experiment]:
    """Return the experiments with these keys, or all.

    Raises InterpError for a key that is none; the nearest is named.

    >>> [e.key for e in chosen(["e4", "E8"])]
    ['E4', 'E8']
    """
    if only is None:
        return EXPERIMENTS
    known = [e.key for e in EXPERIMENTS]
    for key in only:
        if key.upper() not in known:
            raise InterpError(
                f"there is no experiment {key!r}{nearest(key.upper(), known)}; there are {', '.join(known)}"
            )
    wanted = {key.upper() for key in only}
    return [e for e in EXPERIMENTS if e.key in wanted]


def wanted_runs(experiments: list[Experiment], settings: Settings) -> dict[str, Conditions]:
    """Return which runs and conditions the experiments need together."""
    found: dict[str, Conditions] = {}
    for experiment in experiments:
        for run, conditions in experiment.needs(settings).items():
            found.setdefault(run, {}).update(conditions)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))

"""The runs of a reproduction: which prompts, conditions and captures, what they cost, and making them by the job engine.

Experiments share runs: every condition of a run starts from the same noise, and there is one baseline for all.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xarray as xr

from interp.errors import InterpError
from interp.jobs import Job, run_job
from interp.jobs.spec import parse_job
from interp.reproduction.prompt_sets import choose_pairs, coco_captions
from interp.reproduction.settings import Settings
from interp.scoring import find_metric, score
from interp.stores import Run, open_run

Spec = dict[str, Any]
Conditions = dict[str, list[Spec]]
BASELINE: Conditions = {"baseline": []}
PICTURES = {"attention": None, "latents": False, "noise_pred": False}
SECONDS = "seconds_per_sample"
"""Attribute of `/scores`: batch → wall seconds of the job for each sample of it, pictures and files included."""
FRECHET = ("removal", "captions", "fewer_steps")
"""Runs of E8."""


@dataclass(frozen=True)
class Recipe:
    """One run: its prompt table, conditions, and what it keeps."""

    name: str
    rows: list[dict[str, Any]]
    conditions: Conditions
    capture: dict[str, Any]
    steps: int
    guidance_scale: float | None
    scheduler: str | None = None

    def job(self, settings: Settings, folder: Path) -> Job:
        """Return the job that makes the run."""
        return parse_job({
            "model": settings.model, "prompts": self.rows, "seeds": [settings.seed], "steps": self.steps,
            "guidance_scale": self.guidance_scale, "size": settings.size, "scheduler": self.scheduler,
            "capture": self.capture, "conditions": self.conditions, "store": str(folder / f"{self.name}.zarr"),
            "batch_size": settings.batch_size,
        })  # fmt: skip

    def passes(self) -> int:
        """Forward passes of the denoiser, one sample and branch each, if it is evaluated once a step."""
        return len(self.rows) * sum(sum(self._branches(specs)) for specs in self.conditions.values())

    def _branches(self, specs: Sequence[Spec]) -> list[int]:
        guided = 1 if self.guidance_scale is not None and self.guidance_scale <= 1 else 2
        off = [s for s in specs if s["name"] == "remove_text"]
        return [
            1 if any((s.get("start") or 0) <= i < s.get("stop", self.steps) for s in off) else guided
            for i in range(self.steps)
        ]


def recipes(settings: Settings, wanted: Mapping[str, Conditions]) -> list[Recipe]:
    """Return the recipes of the runs named in `wanted` (run → conditions)."""
    pairs, _ = choose_pairs(settings.model, settings.pairs, settings.prompts, settings.seed)
    both = [
        {"prompt": one, "target": other, "pair": k} for k, pair in enumerate(pairs) for one, other in (pair, pair[::-1])
    ]
    first = [{"prompt": a, "pair": k} for k, (a, _) in enumerate(pairs)]
    captions = first
    if settings.coco is not None:
        captions = [{"prompt": c, "pair": k} for k, c in enumerate(coco_captions(settings.coco, settings.pairs))]
    attention = settings.attention_prompts // 2 * 2
    tables: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "exchange": (both, PICTURES),
        "removal": (first, PICTURES),
        "captions": (captions, PICTURES),
        "fewer_steps": (captions, PICTURES),
        "attention": (both[:attention], {"latents": False, "noise_pred": False, "steps": kept_steps(settings.steps)}),
        "trajectory": (first[: settings.trajectory_prompts], {"attention": None}),
    }
    made = []
    for name, conditions in wanted.items():
        rows, capture = tables[name]
        steps, solver = settings.steps, None
        if name == "fewer_steps":
            steps, solver = max(4, settings.steps // 2), "DPMSolverMultistepScheduler"
        every = {**BASELINE, **conditions}
        made.append(Recipe(name, rows, every, dict(capture), steps, settings.guidance_scale, solver))
    return made


def kept_steps(steps: int, most: int = 26) -> list[int]:
    """Return the steps whose attention is kept: evenly spread, the first and the last among them."""
    number = min(steps, most)
    return sorted({round(k * (steps - 1) / (number - 1)) for k in range(number)})


def with_stored(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the conditions that the run has already: a run can grow, not shrink."""
    path = folder / f"{recipe.name}.zarr"
    if not path.exists():
        return recipe
    there = dict(open_run(path).attrs.get("conditions") or {})
    kept = {name: [_plain(spec) for spec in specs] for name, specs in there.items() if name not in recipe.conditions}
    return Recipe(**{**recipe.__dict__, "conditions": {**kept, **recipe.conditions}})


def _plain(spec: Mapping[str, Any]) -> Spec:
    return {k: v for k, v in json.loads(json.dumps(spec)).items() if v is not None}


def cost(made: Iterable[Recipe]) -> str:
    """Say what the runs will cost, in forward passes."""
    lines, total = [], 0
    for r in made:
        passes = r.passes()
        total += passes
        lines.append(
            f"  {r.name:<12} {len(r.rows):>5} prompts × {len(r.conditions):>2} conditions, {r.steps} steps: {passes:>9,} "
            "forward passes"
        )
    return "\n".join([*lines, f"  {'in all':<12} {total:>51,} forward passes of one sample and one branch"])


def make(recipe: Recipe, settings: Settings, folder: Path, *, progress: bool = True) -> Run:
    """Make what the run still lacks, score it, and open it."""
    recipe = with_stored(recipe, folder)
    report = run_job(recipe.job(settings, folder), progress=progress)
    if report.code:
        raise InterpError(
            f"{report.failed} samples of {str(report.path)!r} failed: `interp info {report.path}` says why; repair the "
            "cause and give the same command again"
        )
    run = _timed(open_run(report.path), report.timings)
    metrics = metrics_of(recipe, settings)
    if metrics:  # only what has no score yet is scored
        run = score(run, metrics, progress=progress, **_options(settings))
    return run


def _timed(run: Run, timings: Mapping[int, float]) -> Run:
    """Write seconds a sample by batch into the attributes of `/scores`.

    The first batch of a call warms up: it is left out if another of its condition was timed, and on a GPU, where that may
    take most of its seconds, in any case.
    """
    if not timings:
        return run
    samples = run.samples.groupby("batch")
    size, condition = samples.size(), samples["condition"].first()
    first, *others = timings
    alone = condition[first] not in set(condition[others])
    kept = timings if alone and run.attrs["device"] == "cpu" else others
    found = {str(b): timings[b] / int(size[b]) for b in kept}
    run.write_scores({}, {SECONDS: found})
    return run.reopened()


def check_metrics(made: Iterable[Recipe], settings: Settings) -> None:
    """Load the models that will score the runs, before hours go into making them; InterpError if one cannot be had."""
    about = _planned(settings)
    for name in dict.fromkeys(m for recipe in made for m in metrics_of(recipe, settings)):
        find_metric(name, _options(settings)).made(about)


def _planned(settings: Settings) -> Run:
    """Return a run of this model that has nothing yet."""
    return Run(xr.DataTree(xr.Dataset(attrs={"pipeline": {"id": settings.model}})))


def _options(settings: Settings) -> dict[str, Any]:
    return {k: v for k in ("clip_model", "blip_model") if (v := getattr(settings, k)) is not None}


def metrics_of(recipe: Recipe, settings: Settings) -> list[str]:
    """Return the metrics of a run: alignment by CLIP and, if there is one, the other judge; closeness to the baseline."""
    if recipe.name == "trajectory":
        return []
    judge = ["judge"] if settings.model == "scenes" else ["blip_vqa"] if settings.blip_model is not None else []
    whole = [name for name in frechet(settings) if can_be_had(name, settings)] if recipe.name in FRECHET else []
    return ["clip", *judge, "clip_image", *whole]


def frechet(settings: Settings) -> tuple[str, ...]:
    """Return the metrics that are E8's FID: in the features of the CLIP that scores, and, for photographs, of Inception-v3."""
    return ("clip_fid",) if settings.model == "scenes" else ("clip_fid", "fid")


@cache
def can_be_had(metric: str, settings: Settings) -> bool:
    """Whether what a metric needs is here: torchmetrics, and for `fid` torch-fidelity and its weights."""
    try:
        find_metric(metric, _options(settings)).made(_planned(settings))
    except InterpError:
        return False
    return True

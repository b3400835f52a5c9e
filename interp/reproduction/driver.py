"""`reproduce`: make the runs, ask them, write the report."""

from __future__ import annotations

import csv
import json
import sys
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from interp.loading import loaded_once
from interp.reproduction.catalog import chosen, wanted_runs
from interp.reproduction.experiment import Experiment
from interp.reproduction.measures import Answer, Estimate, minus
from interp.reproduction.page import write_page
from interp.reproduction.prompt_sets import choose_pairs
from interp.reproduction.runs import check_metrics, cost, make, recipes
from interp.reproduction.settings import Settings
from interp.reproduction.trimmed import trim
from interp.stores import Run, open_run


def reproduce(
    out: str | PathLike[str] = "reproduction",
    settings: Settings | None = None,
    *,
    only: list[str] | None = None,
    progress: bool = True,
) -> str:
    """Run the paper's experiments, or go on with them, and write the report; return its summary as text.

    Args:
        out: The folder of runs and report. The runs `<name>.zarr` are ordinary runs; `report.html` links to them.
        settings: Model and size; default is the full one on scenes. Those of a folder cannot be changed.
        only: Keys such as ["E4", "E8"]: runs grow by what these need. The report then has these experiments alone.
        progress: Print what it costs before it begins, and show progress bars.

    Returns:
        One line an experiment: key, verdict, title, main number.

    Raises:
        InterpError: the folder holds something else or other settings, an experiment does not exist, samples failed.

    Source: Yi et al., "Towards Understanding the Working Mechanism of Text-to-Image Diffusion Model", arXiv:2405.15330.
    """
    settings, folder = settings or Settings(), Path(out)
    experiments = chosen(only)
    wanted = wanted_runs(experiments, settings)
    made = recipes(settings, wanted)
    if not all((folder / f"{recipe.name}.zarr").exists() for recipe in made):
        check_metrics(made, settings)
    settings.keep(folder)
    if progress:
        print(f"{len(made)} runs in {folder}:\n{cost(made)}", file=sys.stderr)
    with loaded_once():
        runs = {recipe.name: make(recipe, settings, folder, progress=progress) for recipe in made}
    return build_report(folder, settings, experiments, runs, progress=progress)


def build_report(
    folder: Path,
    settings: Settings,
    experiments: list[Experiment],
    runs: dict[str, Run] | None = None,
    *,
    progress: bool = True,
) -> str:
    """Ask the runs of a folder and write report.html, numbers.json, summary.csv and trimmed runs; return the summary.

    Raises InterpError when a run is missing.
    """
    opened = dict(runs or {})
    for name in wanted_runs(experiments, settings):
        if name not in opened:
            opened[name] = open_run(folder / f"{name}.zarr")
    answers: dict[str, Answer] = {}
    with tqdm(experiments, unit="experiment", disable=not progress) as bar:
        for e in bar:
            bar.set_description(e.key)
            if e.answer is not None:
                answers[e.key] = e.answer(opened, settings)
    _, said = choose_pairs(settings.model, settings.pairs, settings.prompts, settings.seed)
    for name in opened:
        trim(folder / f"{name}.zarr", folder / "trimmed" / f"{name}.zarr.zip")
    write_page(folder / "report.html", settings, experiments, answers, opened, said)
    rows = [_row(e, answers.get(e.key)) for e in experiments]
    with (folder / "summary.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["experiment", "verdict", "title", "number", "n"])
        writer.writerows(rows)
    numbers = {
        e.key: {"title": e.title, "verdict": row[1], "n": row[4], **_numbers(answers[e.key])}
        for e, row in zip(experiments, rows, strict=True)
        if e.key in answers
    }
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [f"{key:<4} {verdict:<18} {title}: {number}" for key, verdict, title, number, _ in rows]
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])


def _row(experiment: Experiment, answer: Answer | None) -> list[str]:
    if answer is None:
        return [experiment.key, "out of reach", experiment.title, "not run", ""]
    return [experiment.key, answer.verdict, experiment.title, minus(answer.sentence), answer.n]


def _numbers(answer: Answer) -> dict[str, Any]:
    checks = [
        {"claim": c.claim, **_plain(c.number), "rule": c.rule(), "state": c.state, "decides": c.decides}
        for c in answer.checks
    ]
    tables = [
        {"caption": t.caption, "columns": t.columns, "rows": [[_cell(v) for v in row] for row in t.rows]}
        for t in answer.tables
    ]
    return {"runs": answer.runs, "checks": checks, "tables": tables}


def _plain(e: Estimate) -> dict[str, Any]:
    values = {"value": e.value, "low": e.low, "high": e.high, "n": e.n}
    return {k: None if isinstance(v, float) and v != v else v for k, v in values.items()}


def _cell(value: Any) -> Any:
    if isinstance(value, Estimate):
        return _plain(value)
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value

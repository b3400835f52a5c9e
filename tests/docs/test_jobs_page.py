"""The page on jobs does what it says: its job file runs, its Python block runs, its commands have these options."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from interp.cli import app
from interp.stores import open_run
from tests.test_cli import interp

pytestmark = pytest.mark.usefixtures("thin", "memory_untold")

PAGE = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_the_job_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(blocks("yaml")[0])
    first = blocks("console")[0].splitlines()
    dry = interp(*shlex.split(first[0].removeprefix("$ interp ")))
    assert "12 samples = 3 conditions × 2 prompts × 2 seeds" in dry.stdout
    assert not (tmp_path / "run.zarr").exists()
    exec(compile(blocks("python")[0], "jobs.md", "exec"), {})
    assert "12 of 12" in capsys.readouterr().out
    again = interp(*shlex.split(first[1].removeprefix("$ interp ")))
    assert again.returncode == 0 and "0 by this call" in again.stdout
    run = open_run(tmp_path / "run.zarr")
    assert run.conditions == ["baseline", "late", "swap"]
    assert "judge:prompt" in run.scores.metric.values
    assert (tmp_path / "run.zarr.probes" / "frequency_energy.zarr").is_dir()
    assert interp(*shlex.split(first[2].removeprefix("$ interp "))).returncode == 0


def test_the_commands_of_the_page_exist() -> None:
    command = typer.main.get_command(app)
    found = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ interp ")]
    assert len(found) >= 5
    for line in found:
        words = shlex.split(line)[2:]
        options = {o for p in command.commands[words[0]].params for o in p.opts}
        assert {w for w in words if w.startswith("--")} <= options, line

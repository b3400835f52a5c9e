"""Every script in examples/ runs as its first lines say."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import interp

pytestmark = pytest.mark.usefixtures("thin")

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SMALL = {
    "layer_sweep": ["1", "1"], "causal_tracing": ["1", "2"], "prompt_to_prompt": ["1", "3"], "spare_passes": ["2", "2"],
    "intervene_and_compare": ["3"], "steering": ["1"],
}  # fmt: skip
"""Numbers of prompts (and steps) where the defaults take long; the scripts' first lines say what they are."""


def test_there_is_one_for_each_use() -> None:
    assert {s.stem for s in SCRIPTS} >= {
        "custom_probe", "plain_xarray", "intervene_and_compare", "layer_sweep", "causal_tracing", "steering",
        "prompt_to_prompt", "spare_passes",
    }  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_example_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In this process: importing torch anew for each script would take longer than the scripts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *SMALL.get(script.stem, [])])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


WITHOUT = """
import runpy, sys
sys.modules["interp"] = None  # importing it would fail
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_a_run_is_read_without_interp_and_without_a_warning(tmp_path: Path) -> None:
    script = next(s for s in SCRIPTS if s.stem == "plain_xarray")
    interp.trace("scenes", "a large red circle", steps=1, store=tmp_path / "run.zarr", progress=False)
    command = [sys.executable, "-W", "error", "-c", WITHOUT, str(script), "run.zarr"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "'large' of 'a large red circle' looks most at" in done.stdout

"""Every script in examples/ runs as its first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_there_is_one_for_each_use() -> None:
    assert {s.stem for s in SCRIPTS} >= {
        "custom_probe", "plain_xarray", "intervene_and_compare", "layer_sweep", "causal_tracing", "steering",
        "prompt_to_prompt",
    }  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

"""The page on reproducing and the notebook do what they say."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from interp.cli import app
from interp.scenes.marked import filled
from tests.reproduction.notebook import execute
from tests.reproduction.summary import table

pytestmark = pytest.mark.usefixtures("thin", "memory_untold")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")


def test_the_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(compile(block, "reproduce.md", "exec"), {})
    report, own = capsys.readouterr().out.splitlines()[-1].split(" = ")
    assert float(report) == pytest.approx(float(own), rel=1e-5) and (tmp_path / "tiny" / "report.html").exists()


def test_the_commands_of_the_page_exist() -> None:
    command = typer.main.get_command(app)
    found = [line for block in re.findall(r"^```console\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
    assert len(found) >= 4
    for line in found:
        words = shlex.split(line.removeprefix("$ interp "))
        options = {o for p in command.commands[words[0]].params for o in p.opts}  # type: ignore[attr-defined]
        assert {w for w in words if w.startswith("--")} <= options, line


def test_the_table_of_the_page_is_that_of_the_report() -> None:
    assert filled(PAGE, {"summary": table()}) == PAGE


def test_the_notebook_is_committed_as_it_was_executed() -> None:
    notebook = json.loads((ROOT / "examples" / "what_carries_the_prompt.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code)
    assert "256 pairs" in "".join(code[0]["outputs"][0]["text"])


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    some = {"value": 0.1, "low": -0.1, "high": 0.2}
    conditions = ("whole", "words of A, EOS of B", "words only", "EOS only")
    made = {c: dict.fromkeys(("with A", "with B", "B − A"), some) for c in conditions}
    (tmp_path / "made.json").write_text(
        json.dumps({"variants": {"shallow": {"text": "two layers", "unet": {"steps": 7}, **made}}})
    )
    for name, value in {"PAIRS": "2", "STEPS": "2", "SIZE": "32", "VARIANTS": str(tmp_path / "made.json")}.items():
        monkeypatch.setenv(f"INTERP_{name}", value)
    printed = execute(ROOT / "examples" / "what_carries_the_prompt.ipynb", tmp_path / "executed.ipynb")
    assert "variant shallow    neither    wins   B − A = 0.100 [-0.100, 0.200]" in printed
    assert "2 pairs, 2 steps" in printed and "alignment with A left" in printed
    text = (tmp_path / "executed.ipynb").read_text(encoding="utf-8")
    assert text.count("text/html") >= 6 and "EOS of B, values only" in text

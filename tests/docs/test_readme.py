"""The README's code runs and prints what the README says; its commands exist; its links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n<!-- output -->\n```\n(.*?)```)?", README, re.S)


def test_the_readme_has_code() -> None:
    assert len(BLOCKS) >= 2 and any(output for _, output in BLOCKS)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs_and_prints_what_is_shown(number: int) -> None:
    code, output = BLOCKS[number]
    printed = io.StringIO()
    scope: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        exec("import interp\n" + code, scope)
    if output:
        assert numbers(printed.getvalue()) == pytest.approx(numbers(output), abs=0.011)  # kernels differ between CPUs
        assert words(printed.getvalue()) == words(output)


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+\.?\d*", text)]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z_]+", text)


def test_relative_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)

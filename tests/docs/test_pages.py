"""Every Python block of the pages on tracing and interventions runs, in order, as a reader would type it."""

import linecache
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("a_quarter_as_wide")

DOCS = Path(__file__).parents[2] / "docs"
EXPECTED = {
    "families": ["unet True", "branches: ok\nlayout: ok\nfused projections: the same", "acatthatsits</s>"],
    "attribution": [
        "1 nats (log-odds against the pixel's strongest other word) | 0 | 1 (share of the pixel's attention"
    ],
    "scores": ["('sample',)\n", "['sharpness', 'flips:baseline']\n4\n"],
    "tracing": ["2\n", "4\n", "forward passes", "'axis_0'"],
    "recording": [
        "{'sample': 1, 'step': 2, 'branch': 2, 'layer': 3, 'head': 2, 'token': 2, 'query_y': 4, 'query_x': 8}",
        "['red', '<|endoftext|>']",
        "update = out − in: True",
        "'layer': 5, 'token': 77",
        "4.0\n",
        "budget='1GB'",
        "'role': 5",
        "heads='mean' saves",
        "[700. 300.] 2",
    ],
    "nnsight": [
        "True\n",
        "2 (32, 32)",
        "2 ('sample'",
        "True False\n",
        "False ['for step in tracer.iter",
        "[0.0, 0.0] True",
    ],
    "interventions": [
        "[5 3 5 5]",
        "adaptive  passes [7, 8]",
        "T-GATE    passes [9, 9]",
        "frozen in [1, 3]",
        "does not run there",
        "[2 1 2] [-1 -1 16]",
        "hidden [0.0, 0.0]",
        "[False, True]",
        "('layers', 'metric', 'pair')",
        "[1. ",  # all of the last layer's states bring everything back
        "'all [SOS]', '[SOS] + 76 [EOS]'] ['bos', 'eos']",
        "[-1  0  2  4] 0.0",
        "no pooled vector",
        "both decide about 'branches'",
        "both decide about 'site unet.mid_block:out'",
        "which RemoveText(start=0.5) leaves out in steps 25–49",
    ],
}


@pytest.mark.parametrize("page", EXPECTED)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    if page != "recording":  # the one that says something of memory, for which a plan takes calls without data
        monkeypatch.setattr("interp.planning.peak_memory", lambda *_, **__: 0)
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    names: dict[str, object] = {}
    for i, block in enumerate(blocks):
        # a file of its own, as in a notebook: nnsight reads the source of its blocks
        file = f"{tmp_path}/{page}_{i}.py"
        linecache.cache[file] = (len(block), None, block.splitlines(keepends=True), file)
        exec(compile(block, file, "exec"), names)
    printed = capsys.readouterr().out
    for piece in EXPECTED[page]:
        assert piece in printed


def test_glossary_has_every_dimension_of_the_format() -> None:
    from interp.stores import TABLE

    words = (DOCS / "glossary.md").read_text(encoding="utf-8")
    for dim in {d for row in TABLE for d in row.dims} & {"sample", "step", "branch", "layer", "token"}:
        assert f"| {dim}" in words or f", {dim}" in words

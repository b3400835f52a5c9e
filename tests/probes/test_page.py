"""The page "Write a probe": its Python blocks run in order, as a reader would type them."""

import re
from pathlib import Path

from interp.probes.testing import check_probe

PAGE = Path(__file__).parents[2] / "docs" / "probes.md"


def test_the_page_runs_as_it_is_read(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    Path("sharpness.py").write_text(blocks[0], encoding="utf-8")
    assert len(blocks[0].splitlines()) == 8
    names = {"__name__": "page"}
    for number, block in enumerate(blocks):
        Path(f"block{number}.py").write_text(block, encoding="utf-8")
        exec(compile(block, f"block{number}.py", "exec"), names)
    printed = capsys.readouterr().out
    assert "{'sample': 4, 'step': 6}" in printed and '{"power": 1.0}' in printed
    assert "needs attention, which this run did not capture" in printed
    assert Path("bos.png").stat().st_size > 1000
    for name in ("sharpness", "bos_share"):
        for check in check_probe(names[name]):
            if check.name != "pickled":  # these live in no module
                check()

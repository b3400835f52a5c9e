"""The demo: every figure that the page shows is there, the table is right, and nothing of the user's is touched."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import interp
from interp.demo import run_demo
from interp.demo.story import PAIRS

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def out(thin: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    folder.parent.joinpath("said.txt").write_text(run_demo(folder, steps=5, pairs=PAIRS[1:3]))
    return folder


def test_page_shows_its_pictures_and_nothing_from_outside(out: Path) -> None:
    page = (out / "index.html").read_text()
    pictures = re.findall(r'src="([^"]+)"', page)
    assert len(pictures) == 7 and page.count("<li>") == 3
    for name in pictures:
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # not blank
    assert "http" not in page and "<script" not in page
    assert all(re.search(r"</h2><p>\S", s) for s in re.findall(r"<section>.*?</section>", page, re.S))


def test_run_is_complete_and_plain(out: Path) -> None:
    run = interp.open_run(out / "run.zarr")
    assert (run.samples["status"] == 1).all() and len(run) == 24
    assert {"clip:prompt", "clip:target", "judge:prompt", "judge:target"} <= set(run.scores["metric"].values)


def test_table_agrees_with_the_run(out: Path) -> None:
    table = pd.read_csv(out / "text_removed.csv")
    assert table["text removed last %"].tolist() == [0, 20, 40, 60, 80]
    # 5 steps, two branches: removing the text in the last k steps skips k passes of 10
    assert table["passes"].tolist() == [10, 9, 8, 7, 6]
    assert table["passes saved %"].to_numpy() == pytest.approx([0, 10, 20, 30, 40])
    assert table["seconds"].gt(0).all()
    assert table["L1 to baseline %"].iloc[0] == 0 and table["L1 to baseline %"].iloc[4] > 0


def test_it_says_where_to_look(out: Path) -> None:
    assert str(out / "index.html") in out.parent.joinpath("said.txt").read_text()


def test_again_is_quick_and_gives_the_same(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(p.name for p in out.iterdir())
    chunks = {p: p.stat().st_mtime_ns for p in (out / "run.zarr").rglob("c/*")}
    table = pd.read_csv(out / "text_removed.csv")
    monkeypatch.setattr("interp.demo.story.draw_sections", lambda *_: [])  # drawn anew from the same run
    run_demo(out, steps=5, pairs=PAIRS[1:3])
    assert sorted(p.name for p in out.iterdir()) == before
    assert chunks and {p: p.stat().st_mtime_ns for p in chunks} == chunks
    pd.testing.assert_frame_equal(pd.read_csv(out / "text_removed.csv"), table)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(interp.InterpError, match="holds something else"):
        run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

"""Sets of prompts, from files of the form that T2I-CompBench and COCO have."""

import json
from collections import Counter
from pathlib import Path

import pytest

from interp import InterpError
from interp.reproduction import PromptSet, choose_pairs, coco_captions, compbench


def lines(path: Path, texts: list[str]) -> None:
    path.write_text("\r\n".join(texts) + "\r\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files with the released counts: 860, 1,000 and 1,000 lines, of which 800, 800 and 1,000 are PromptSet's."""
    color = [f"a red thing{i} and a green school bus{i}" for i in range(800)]
    texture = [f"rubber gloves{i} and a fluffy teddy bear" for i in range(800)]
    lines(
        tmp_path / "color.txt",
        color[:300] + [f"A bathroom with white tile and a beige toilet {i}." for i in range(60)] + color[300:],
    )
    lines(tmp_path / "texture.txt", texture + [f"The leather belt {i} lies on the wooden desk." for i in range(200)])
    lines(tmp_path / "complex.txt", [f"The black chair {i} is on the right of the wooden table." for i in range(1000)])
    return tmp_path


def test_counts_are_the_papers(folder: Path) -> None:
    found = compbench(folder)
    assert (len(found.template), len(found.complex), len(found)) == (1600, 1000, 2600) and found.notes == ()
    pairs = found.pairs()
    assert {k: len(v) for k, v in pairs.items()} == {"template": 2000, "complex": 1000}
    assert all(a != b for found in pairs.values() for a, b in found)
    assert len({frozenset(p) for p in pairs["template"]}) == 2000  # no pair twice, nor its reverse
    assert set(Counter(x for p in pairs["template"][:800] for x in p).values()) == {1}  # the first share no prompt
    assert {x for p in pairs["complex"] for x in p} == set(found.complex)
    assert pairs == compbench(folder).pairs() and pairs != found.pairs(seed=1)


def test_other_counts_are_said_in_a_sentence(folder: Path) -> None:
    path = folder / "color.txt"
    lines(path, path.read_text().splitlines()[1:])
    assert compbench(folder).notes == ("color.txt gives 799 prompts where the paper's PromptSet has 800.",)
    chosen, said = choose_pairs("some/model", 6, folder)
    assert "799" in said and len(chosen) == 6
    assert ["black chair" in a for a, _ in chosen] == [False, False, True] * 2  # two template pairs to a complex one


def test_what_is_no_such_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "texture.txt").unlink()
    with pytest.raises(InterpError, match=r"no texture\.txt"):
        compbench(folder)
    lines(folder / "texture.txt", ["The leather belt lies on the desk."])
    with pytest.raises(InterpError, match="has no prompt of the kind"):
        compbench(folder)


def test_pairs_without_a_folder() -> None:
    from interp.scenes import pairs

    assert choose_pairs("scenes", 3)[0] == pairs(3)
    own, said = choose_pairs("some/model", 3)
    assert all(" and a" in text for pair in own for text in pair) and "our own" in said
    with pytest.raises(InterpError, match="ask for fewer"):
        choose_pairs("some/model", 10_000)
    assert PromptSet(["a", "a"], []).pairs()["template"] == []  # no pair holds one text twice


def test_coco_captions(tmp_path: Path) -> None:
    rows = [
        {"image_id": i, "id": 10 * i + k, "caption": f"picture {i},\n caption {k} "}
        for i in range(5, 0, -1)
        for k in (1, 0)
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": rows}))
    assert sorted(coco_captions(path, 5)) == [f"picture {i}, caption 0" for i in range(1, 6)]
    assert coco_captions(path, 3) == coco_captions(path, 5)[:3]
    with pytest.raises(InterpError, match="captions of 5 pictures, 6 were asked for"):
        coco_captions(path, 6)
    path.write_text("{}")
    with pytest.raises(InterpError, match="no COCO caption file"):
        coco_captions(path, 1)

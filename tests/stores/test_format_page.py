"""The documentation page and the table are one."""

from pathlib import Path

import pytest

from interp.stores.format_page import with_tables
from interp.stores.table import TABLE, find_variable, node_rows

PAGE = Path(__file__).parents[2] / "docs" / "format.md"


def test_the_page_is_up_to_date():
    text = PAGE.read_text()
    assert text == with_tables(text), "run `python -m interp.stores.format_page`"


def test_every_variable_is_on_the_page():
    text = PAGE.read_text()
    for variable in TABLE:
        assert f"| `{variable.name}`" in text
        assert variable.meaning in text


@pytest.mark.parametrize(
    ("path", "dims"),
    [
        ("attention/32x32/probs", 8),
        ("self_attention/8x16/probs", 9),
        ("text_attention/8x8/probs", 8),
        ("within_text_attention/8x8/probs", 7),
        ("trajectory/latents", 5),
        ("status", 1),
        ("sites/unet.mid_block:out/value", 4),
    ],
)
def test_paths_find_their_row(path, dims):
    assert len(find_variable(path).dims) == dims
    node, _, name = path.rpartition("/")
    assert node_rows(node)[name] is find_variable(path)


def test_rows_are_unique():
    assert len({v.path for v in TABLE}) == len(TABLE)
    assert find_variable("attention/32x32/other") is None
    assert find_variable("attention/probs") is None

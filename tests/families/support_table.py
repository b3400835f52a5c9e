"""The tables of docs/families.md, from the families and the suite; `python -m tests.families.support_table` writes them."""

import re
from pathlib import Path

from interp.families import Family, find_family
from interp.testing.checks import SCHEDULERS
from interp.testing.ways import WAYS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = ("model", "pipeline", "family", "attention (sites of the tiny model)", "text", "guidance", "latents")


def support() -> list[tuple[str, ...]]:
    """One row for each tiny pipeline that the conformance suite runs on."""
    from tests.families.test_conformance import MODELS

    return [HEAD, *(row(name) for name in MODELS)]


def row(name: str) -> tuple[str, ...]:
    """What the family of a tiny pipeline says of it."""
    from tests.families.test_conformance import MODELS

    settings = MODELS[name][1]
    pipe = pipeline(name)
    family = find_family(pipe)
    given = {"height": 32, "width": 48, **settings.get("options", {})}
    arguments = family.arguments({**given, **{k: v[0] for k, v in settings.get("for_each", {}).items()}})
    kinds = [s.kind for s in family.attention_sites()]
    attention = ", ".join(f"{k} {kinds.count(k)}" for k in ("cross", "joint", "self", "text") if k in kinds) or "none"
    branches, packing = guidance(family, settings), latents(family, arguments)
    return model(name), f"`{type(pipe).__name__}`", family.name, attention, text(family), branches, packing


def pipeline(name: str):
    """The tiny pipeline that the suite was run on."""
    from tests.families.test_conformance import CHECKS

    return next(iter(CHECKS[name].values())).case.pipe


def model(name: str) -> str:
    """What the model is called."""
    from tests.families.test_conformance import MODELS

    return (MODELS[name][0].__doc__ or name).split(":")[0].split(", which")[0]


def text(family: Family) -> str:
    """Which encoders' positions the attention sees, and what other encoders give."""
    seen = list(family.text_segments())
    encoders = {name: type(encoder).__name__ for name, (_, encoder) in family.text_encoders.items()}
    beside = sorted({encoders[n] for n in encoders if n not in seen} - {encoders[n] for n in seen if n in encoders})
    shown = ", then ".join(dict.fromkeys(encoders.get(n, n) for n in seen)) or "not known"
    return shown + (f"; with {', '.join(beside)}" if beside and seen else "")


def guidance(family: Family, settings: dict) -> str:
    """How branches come."""
    if settings.get("guided", "default") is None:
        return "none"
    return "a call per branch" if family.sequential else "rows of one call"


def latents(family: Family, arguments: dict) -> str:
    """Whether the scheduler handles them packed."""
    import torch

    whole = torch.zeros(1, *family.latent_shape(arguments))
    return "packed" if family.pack(whole).shape != whole.shape else "as they are"


def tried(names) -> list[tuple[str, ...]]:
    """What came of running each model in other ways, or with other schedulers."""
    from tests.families.test_conformance import FAMILIES, outcome

    cells = {"the same numbers": "=", "refused": "refused", "not offered": "–"}
    shown = {check: name for name, check in names.items()}
    rows = [(model(name), *(cells[outcome(name, c).partition(":")[0]] for c in shown)) for name in FAMILIES]
    return [("model", *shown.values()), *rows]


TABLES = {
    "support": support,
    "ways": lambda: tried({name: name for name in WAYS}),
    "schedulers": lambda: tried({name.removeprefix("steps with "): name for name in SCHEDULERS}),
}


def with_tables(page: str) -> str:
    """Return the page with what lies between the marks of each table replaced."""
    for name, rows in TABLES.items():
        head, *body = rows()
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *body)]
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        table = "\n".join(lines)
        page, found = re.subn(
            f"{begin}.*?{end}", lambda _, b=begin, t=table, e=end: f"{b}\n\n{t}\n\n{e}", page, flags=re.S
        )
        assert found == 1, f"the page has no place for the table {name!r}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""The support table of docs/families.md, made from the families; `python -m tests.families.support_table` writes it."""

from pathlib import Path

from interp.families import Family, find_family
from tests.families.pipelines import BUILDERS, tiny

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
HEAD = ("model", "pipeline", "family", "attention (sites of the tiny model)", "text", "guidance", "latents")


def table() -> str:
    """One row for each tiny pipeline that the conformance suite runs on."""
    from tests.families.test_conformance import FAMILIES

    rows = [HEAD, ("---",) * len(HEAD), *(row(name, FAMILIES[name]) for name in FAMILIES)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(name: str, settings: dict) -> tuple[str, ...]:
    """What the family of a tiny pipeline says of it."""
    pipe = tiny(name)
    family = find_family(pipe)
    arguments = family.arguments({"height": 32, "width": 48, **settings.get("options", {})})
    kinds = [s.kind for s in family.attention_sites()]
    attention = ", ".join(f"{k} {kinds.count(k)}" for k in ("cross", "joint", "self") if k in kinds) or "none"
    model = (BUILDERS[name].__doc__ or name).split(":")[0]
    branches, packing = guidance(family, settings), latents(family, arguments)
    return model, f"`{type(pipe).__name__}`", family.name, attention, text(family), branches, packing


def text(family: Family) -> str:
    """Which encoders' positions the attention sees, and what other encoders give."""
    seen = list(family.text_segments())
    encoders = {name: type(encoder).__name__ for name, (_, encoder) in family.text_encoders.items()}
    beside = sorted({encoders[n] for n in encoders if n not in seen} - {encoders[n] for n in seen if n in encoders})
    shown = ", then ".join(dict.fromkeys(encoders.get(n, n) for n in seen)) or "not known"
    return shown + (f"; with {', '.join(beside)}" if beside else "")


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


def with_table(page: str) -> str:
    """Return the page with what lies between its two marks replaced by the table."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

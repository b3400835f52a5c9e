"""What a plan says beforehand, against a run: bytes in the store, memory at the peak."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from interp.forecast import Counted, weights
from interp.planning import Plan, plan
from interp.stores import Run
from interp.testing.case import FamilyCase
from interp.tracing import trace

_CONTENTS = 512
"""Bytes a sample for an array's table of contents, which are much for a small array."""


def check_costs(case: FamilyCase) -> None:
    """A plan tells the bytes of a run's files within 5 %, attention as it is before compression, and memory within 20 %.

    Of a run that keeps some of all that can be kept. Memory is all that tensors take at once beside the weights, counted in
    a real run.
    """
    if case.family.needs_picture:  # its runs are recorded, and have no plan
        return
    known = case.everything.changed(image=True)
    if known.attention:
        names = [s.name for s in case.family.attention_sites() if s.kind in ("cross", "joint")]
        first, last = names[0], names[-1]
        known = known.changed(
            sites=(
                *(f"{one}:{q}" for one in {first, last} for q in "qkv"), f"{first}:in", f"{last.rpartition('.')[0]}:update",
                f"{last}:out",
            ),
            reduce={"entropy": (last, "entropy")},
        )  # fmt: skip
    options = case.settings()
    negative = case.negative if options.pop("negative_prompt", None) else ""
    settings: dict[str, Any] = {
        "steps": 2, "guidance_scale": options.pop(case.family.guidance_argument, None), "negative_prompt": negative,
        "height": case.size[0], "width": case.size[1], "options": options, "capture": known, "batch_size": 2,
    }  # fmt: skip
    made = plan(case.pipe, list(case.prompts), **settings)
    with TemporaryDirectory() as folder:
        store = Path(folder) / "run.zarr"
        with Counted() as counted:
            run = trace(case.pipe, list(case.prompts), store=store, progress=False, **settings)
        _check_bytes(made, run, store)
    _near(made.memory - weights(case.pipe), counted.most, 0.2, "memory")


def _check_bytes(made: Plan, run: Run, store: Path) -> None:
    plain = _size(store)
    for name, predicted in made.bytes_by_array.items():
        files = store / name / "c" if name else store
        if name.endswith("/probs"):
            _near(predicted, run.tree[name].nbytes, 0.05, name, _CONTENTS * len(run))
            plain += predicted - _size(files)
        elif name and files.is_dir():
            _near(predicted, _size(files), 0.05, name, _CONTENTS)
    _near(made.bytes, plain, 0.05, "the store")


def _near(predicted: int, found: int, part: float, what: str, more: int = 0) -> None:
    off = abs(predicted - found)
    assert off <= part * found + more, f"{what}: {predicted} bytes were predicted, and it took {found}"


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())

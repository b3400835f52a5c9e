"""An existing run and a job that may ask for more: what is there, what is new, and what was changed."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import InterpError, sentence_list
from interp.planning import Plan, assemble
from interp.prompts import PromptTable
from interp.stores import DONE, FAILED, RunWriter, StoreError, TokenTable, open_run
from interp.stores.create import attr_differences
from interp.stores.files import plain

OWN = ("seed", "condition", "prompt_id", "batch")
GROWS = ("conditions",)
Key = tuple[str, int, int]
"""Condition, prompt_id and seed: what a sample is."""


@dataclass(frozen=True)
class Extension:
    """How far a run is, and the samples that a job adds to it: columns of the table, and root attributes."""

    asked: Plan
    done: int
    failed: int
    waiting: int
    columns: dict[str, list[Any]]
    prompts: PromptTable
    attrs: dict[str, Any]
    width: int

    def __len__(self) -> int:
        return len(self.columns["seed"])

    def append(self, writer: RunWriter, pipe: Any) -> None:
        """Append the new samples; a reader sees all of them or none."""
        new = _assemble(pipe, self.asked, self.columns, self.prompts, self.width)
        tables = {n: TokenTable.of(g) for n, g in new.layout.groups.items() if "token_id" in g.coords}
        writer.grow(self.columns, tables, self.attrs)


def compare(path: Path, asked: Plan) -> Extension:
    """Compare the run at `path` with what a job asks for.

    Raises:
        InterpError: the job differs in more than prompts, seeds and conditions that were added.
    """
    run = open_run(path)
    there, wanted = run.attrs, plain(asked.layout.attrs)
    _check_attrs(path, there, wanted)
    table = run.samples
    names = [str(c) for c in table.columns if c not in ("status", "error")]
    columns = {name: table[name].tolist() for name in names}
    rows = sorted(set(asked.layout.samples) - set(names)) + sorted(set(names) - set(asked.layout.samples))
    if rows:
        raise _refused(path, f"the prompt tables differ in the column{'s' * (len(rows) > 1)} {sentence_list(rows)}")
    stored = _stored_table(columns)
    ids, prompts = _match_prompts(path, stored, asked.prompts)
    if any(stored.columns["negative_prompt"]) != any(
        prompts.columns["negative_prompt"]
    ):  # decided for a run as a whole
        raise _refused(path, "it has no negative prompts, and some of the new rows have one")
    own = asked.layout.samples
    keys: dict[Key, int] = {}
    for i, (c, p, s) in enumerate(zip(own["condition"], own["prompt_id"], own["seed"], strict=True)):
        keys[c, ids[p], s] = i
    have = list(zip(columns["condition"], columns["prompt_id"], columns["seed"], strict=True))
    for key in have:
        if key not in keys:
            raise _refused(path, f"the job lacks a sample of the run: condition {key[0]!r}, seed {key[2]}")
    had = set(have)
    new = [(key, i) for key, i in keys.items() if key not in had]
    added = {name: [own[name][i] for _, i in new] for name in own}
    added["prompt_id"] = [key[1] for key, _ in new]
    added["batch"] = _batches(
        [key[0] for key, _ in new], max(map(len, asked.batches)), max(columns["batch"], default=-1) + 1
    )
    status = table["status"].to_numpy()
    done, failed = int((status == DONE).sum()), int((status == FAILED).sum())
    width = _width(run.tree)
    if width and asked.selection.width > width:
        used = (np.asarray(asked.selection.table.count) > 0).sum(1)
        longest = str(own["prompt"][int(used.argmax())])
        what = f"the prompt {longest!r} needs {used.max()} token columns, but the run has {width}"
        raise _refused(path, f"{what}; one that captures tokens: all has room")
    return Extension(
        asked, done, failed, len(table) - done - failed, added, prompts,
        {"conditions": dict(there["conditions"]) | wanted["conditions"]}, width,
    )  # fmt: skip


def stored_plan(path: Path, asked: Plan, pipe: Any) -> Plan:
    """Return the plan of the samples that the run at `path` has: its table is the truth, not the job file.

    Raises:
        InterpError: this process has another model, device or version of the job than made the run.
    """
    run = open_run(path)
    _check_attrs(path, run.attrs, plain(asked.layout.attrs))
    table = run.samples
    columns = {str(name): table[name].tolist() for name in table.columns if name not in ("status", "error")}
    return _assemble(pipe, asked, columns, _stored_table(columns), _width(run.tree), run.attrs)


def _assemble(
    pipe: Any, asked: Plan, columns: dict[str, list[Any]], prompts: PromptTable, width: int,
    attrs: dict[str, Any] | None = None,
) -> Plan:  # fmt: skip
    batches: dict[int, list[int]] = defaultdict(list)
    for i, number in enumerate(columns["batch"]):
        batches[number].append(i)
    found = assemble(
        pipe, capture=asked.capture, table=prompts, samples=columns, batches=list(batches.values()),
        conditions=asked.conditions, steps=asked.steps, guidance=asked.guidance_scale, height=asked.height,
        width=asked.width, arguments=asked.arguments, options=asked.options, columns=width,
        read=asked.tokens,
    )  # fmt: skip
    if attrs is None:
        return found
    return replace(
        found, layout=replace(found.layout, attrs={**found.layout.attrs, "fingerprint": attrs["fingerprint"]})
    )


def _check_attrs(path: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = attr_differences(there, wanted, leave_out=GROWS)
    conditions = dict(there.get("conditions") or {})
    for name, changes in conditions.items():
        if name not in wanted["conditions"]:
            differences.append(f"the condition {name!r} there, not in the job")
        elif changes != wanted["conditions"][name]:
            differences.append(f"the condition {name!r} is {changes} there, {wanted['conditions'][name]} in the job")
    if differences:
        shown = "; ".join(differences[:4]) + ("; …" if len(differences) > 4 else "")
        raise _refused(path, shown)


def _refused(path: Path, what: str) -> InterpError:
    return InterpError(
        f"{path} holds a run of another job ({what}); prompts, seeds and conditions can be added to a run, anything else "
        "needs another store"
    )


def _stored_table(columns: dict[str, list[Any]]) -> PromptTable:
    """Return the run's prompts by prompt_id."""
    first: dict[int, int] = {}
    for i, number in enumerate(columns["prompt_id"]):
        first.setdefault(int(number), i)
    if sorted(first) != list(range(len(first))):
        raise StoreError("the run's prompt_id are not numbered from 0; it was not made by a job")
    order = [first[k] for k in range(len(first))]
    return PromptTable({name: [values[i] for i in order] for name, values in columns.items() if name not in OWN})


def _match_prompts(path: Path, stored: PromptTable, asked: PromptTable) -> tuple[list[int], PromptTable]:
    """Return each asked row's prompt_id in the run, new ones at its end, and the table of all rows by prompt_id."""
    names = sorted(stored.columns)
    places: dict[tuple, list[int]] = defaultdict(list)
    for k in reversed(range(len(stored))):
        places[tuple(stored.columns[n][k] for n in names)].append(k)
    everything = {name: list(stored.columns[name]) for name in names}
    ids = []
    for row in zip(*(asked.columns[n] for n in names), strict=True):
        if places[row]:
            ids.append(places[row].pop())
            continue
        ids.append(len(everything["prompt"]))
        for name, value in zip(names, row, strict=True):
            everything[name].append(value)
    left = sorted(k for found in places.values() for k in found)
    if left:
        prompt = stored.columns["prompt"][left[0]]
        alike = [i for i, text in enumerate(asked.columns["prompt"]) if text == prompt and ids[i] >= len(stored)]
        if not alike:
            raise _refused(path, f"the job lacks the run's prompt {prompt!r}")
        name = next(n for n in names if asked.columns[n][alike[0]] != stored.columns[n][left[0]])
        a, b = (table.columns[name][i] for table, i in ((stored, left[0]), (asked, alike[0])))
        raise _refused(path, f"of the prompt {prompt!r} the {name} is {a!r} there, {b!r} in the job")
    return ids, PromptTable(everything)


def _batches(conditions: Sequence[str], size: int, first: int) -> list[int]:
    """Number the batches of new samples: at most `size`, never two conditions in one."""
    numbers: list[int] = []
    number, count = first - 1, 0
    for i, condition in enumerate(conditions):
        if not i or condition != conditions[i - 1] or count == size:
            number, count = number + 1, 0
        numbers.append(number)
        count += 1
    return numbers


def _width(tree: Any) -> int:
    """Return how many token columns the run's attention has; 0 if it keeps none."""
    for node in tree.subtree:
        if (
            node.path.split("/")[1] in ("attention", "text_attention", "within_text_attention")
            and "token_id" in node.coords
        ):
            return int(node.sizes["token"])
    return 0

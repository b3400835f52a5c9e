"""The job file: `Job`, how it is read, and its JSON schema for editors."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from interp.errors import InterpError, nearest, sentence_list
from interp.jobs.yaml_file import load_yaml
from interp.stores.identity import check_place

Cell = str | int | float
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
TABLES = (".csv", ".jsonl", ".txt")


class Job(BaseModel):
    """What a job file says. Samples are conditions × prompts × seeds, with the same noise in every condition."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field(description="'scenes' (bundled), a local diffusers folder, or a Hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub repository.")
    dtype: Literal["float16", "bfloat16", "float32"] | None = Field(None, description="Of the weights.")
    prompts: list[str] | list[dict[str, Cell]] | str = Field(
        description="Texts; or rows with a column 'prompt'; or a .csv, .jsonl or .txt file below the job file's folder."
    )
    negative_prompt: str = Field("", description="For rows that name none.")
    seeds: int | list[int] | str = Field(
        0, validate_default=True, description="A number, a list, or text such as '0-9'."
    )
    steps: int = Field(50, ge=1, description="Sampling steps.")
    guidance_scale: float | None = Field(None, allow_inf_nan=False, description="Default: the model's own.")
    size: tuple[int, int] | None = Field(None, strict=False, description="[height, width] in pixels.")
    scheduler: str | dict[str, Any] | None = Field(
        None, description="Class of a diffusers scheduler, or a mapping with 'class' and its settings."
    )
    pipeline: dict[str, Any] = Field({}, description="Further arguments of the pipeline's call.")
    capture: dict[str, Any] = Field({}, description="Fields of interp.Capture.")
    conditions: dict[str, list[dict[str, Any]]] = Field(
        {"baseline": []}, min_length=1, description="Lists of interventions by name; 'baseline' is the empty list."
    )
    scores: list[str] = Field([], description="Metrics to add when the samples are done: clip, judge, l1:baseline.")
    probes: list[str | dict[str, Any]] = Field(
        [],
        description="Installed probes to run when the samples are done: a name, or a mapping with 'name' and parameters.",
    )
    store: str = Field(description="Where the run goes, below the job file's folder.")
    batch_size: int | Literal["auto"] = Field("auto", description="How many samples run together: a number, or 'auto'.")

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("give a whole number of samples, at least 1, or 'auto'")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: int | list[int] | str) -> list[int]:
        return parse_seeds(value) if isinstance(value, str) else [value] if isinstance(value, int) else value

    @field_validator("conditions")
    @classmethod
    def _named(cls, value: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        for name, changes in value.items():
            if not name.strip():
                raise ValueError("a condition has an empty name")
            for change in changes:
                _plugin_name(change, f"condition {name!r}: ")
        return value

    @field_validator("probes")
    @classmethod
    def _installed(cls, value: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        for one in value:
            _plugin_name({"name": one} if isinstance(one, str) else one)
        return value

    @field_validator("scores")
    @classmethod
    def _metrics(cls, value: list[str]) -> list[str]:
        for one in value:
            _plugin_name({"name": one.partition(":")[0]})
        return value

    @property
    def path(self) -> Path:
        """Absolute path of the run."""
        return Path(self.store).expanduser().absolute()


def _plugin_name(spec: Mapping[str, Any], where: str = "") -> None:
    """Refuse what is not the plain name of an installed plugin: a job file cannot name code."""
    name = spec.get("name")
    if not isinstance(name, str):
        raise ValueError(f"{where}{dict(spec)!r} has no 'name'")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
        raise ValueError(f"{where}{name!r} is not the name of an installed plugin; files cannot be named in a job")


def parse_seeds(text: str) -> list[int]:
    """Read '0', '0,1,7' or '0-3'.

    >>> parse_seeds("0-3,7")
    [0, 1, 2, 3, 7]
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part, re.ASCII)
        if not match:
            raise ValueError(f"cannot read the seeds {text!r}: write '0', '0,1,7' or '0-3'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the seeds {text!r} run backwards: write the smaller one first")
        if last - first >= 1_000_000:
            raise ValueError(f"the seeds {text!r} are more than a million; write fewer")
        found += range(first, last + 1)
    return found


def read_job(path: str | Path, *, store: str | Path | None = None, prompts: str | Path | None = None) -> Job:
    """Read a job file; its prompt table is read too, and its paths become absolute.

    Paths in the file are relative to its folder and cannot leave it; `store` and `prompts`, which the caller chooses,
    replace those of the file and may lie anywhere.

    Raises:
        InterpError: the file is not there, is no YAML, has an unknown key (the nearest is named) or a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise InterpError(f"no such job file: {str(path)!r}")
    values = load_yaml(path)
    if store is not None:
        values["store"] = "replaced"
    if prompts is not None:
        values["prompts"] = str(prompts)
    job = parse_job(values, f"{path}: ")
    folder = path.absolute().parent
    check_place(job.store if store is None else store)
    found: dict[str, Any] = {"store": str(store) if store is not None else str(_inside(folder, job.store, "store"))}
    if isinstance(job.prompts, str):
        found["prompts"] = _table(_file(folder, job.prompts) if prompts is None else Path(prompts))
    return job.model_copy(update={**found, "store": str(Path(found["store"]).expanduser().absolute())})


def parse_job(values: Any, where: str = "") -> Job:
    """Return the job of a mapping; InterpError in one sentence if it is none."""
    if not isinstance(values, Mapping):
        raise InterpError(f"{where}a job is a mapping with the keys {sentence_list(Job.model_fields, 20)}")
    for key in values:
        if key not in Job.model_fields:
            known = ", ".join(Job.model_fields)
            hint = nearest(str(key), Job.model_fields)
            raise InterpError(f"{where}a job has no key {str(key)!r}{hint or ';'} it has: {known}")
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        raise InterpError(where + _first(error)) from None


_WANTED = {
    "string_type": "give text",
    "int_type": "give a whole number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "finite_number": "give a finite number",
    "list_type": "give a list",
    "dict_type": "give keys and values",
    "too_short": "give at least one",
    "greater_than_equal": "give at least {ge}",
}
"""What pydantic's errors ask for, by their type."""


_SEVERAL = ("prompts", "seeds", "size", "scheduler", "probes", "batch_size")
"""Keys whose values may be of several kinds, which their descriptions tell."""


def _first(error: ValidationError) -> str:
    """Say the first thing that is wrong, and what else is."""
    found = error.errors(include_url=False)
    missing = [str(e["loc"][0]) for e in found if e["type"] == "missing" and len(e["loc"]) == 1]
    if missing:
        text, told = f"a job needs {sentence_list(missing)}", {*missing}
    else:
        text, told = _one(found[0]), {str(found[0]["loc"][0])}
    rest = list(dict.fromkeys(str(e["loc"][0]) for e in found if e["loc"][0] not in told))
    return text + (f"; also wrong: {', '.join(rest)}" if rest else "")


def _one(error: Any) -> str:
    """Say in words what is wrong with a value."""
    key, given = error["loc"][0], json.dumps(error["input"], default=str, ensure_ascii=False)
    given = given if len(given) <= 60 else given[:57] + "…"
    if error["type"] == "value_error":
        wanted = error["msg"].removeprefix("Value error, ")
        several = isinstance(error["input"], list | dict)  # of which the sentence names the one that is wrong
        said = several or given in wanted or str(error["input"]) in wanted
        return f"{key}: {wanted}" + ("" if said else f", but it is {given}")
    if key in _SEVERAL:
        description = str(Job.model_fields[key].description).rstrip(".")
        return f"{key}: {given} will not do; wanted: {description[0].lower()}{description[1:]}"
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).lstrip(".")
    known = _WANTED.get(error["type"])
    wanted = (
        error["msg"].replace("Input should be ", "give ") if known is None else known.format(**error.get("ctx", {}))
    )
    return f"{place}: {wanted}, but it is {given}"


def _inside(folder: Path, text: str, key: str) -> Path:
    """Return `text` as a path below `folder`, which neither `..` nor a link may leave."""
    target, home = folder / text, folder.resolve()
    parts = Path(text).parts
    if not text or "\0" in text or Path(text).is_absolute() or ".." in parts or text.startswith("~"):
        raise InterpError(
            f"{key}: {text!r} must be a path below the job file's folder {str(folder)!r}; for another place give "
            f"--{key} on the command line"
        )
    real = target.resolve()
    if real == home or home not in real.parents:
        raise InterpError(f"{key}: {text!r} leads out of the job file's folder, by a link to {str(real)!r}")
    if not all(_NAME.fullmatch(p) for p in parts):
        raise InterpError(f"{key}: {text!r} has a part that is no plain name; use letters, digits and _ . + -")
    return target


def _file(folder: Path, text: str) -> Path:
    if not text.endswith(TABLES):
        raise InterpError(f"prompts: {text!r} is no table; give a list, or a {', '.join(TABLES)} file")
    return _inside(folder, text, "prompts")


def _table(path: Path) -> list[dict[str, Cell]]:
    from interp.prompts import prompt_table

    table = prompt_table(path)
    return table.rows(range(len(table)))


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of job files, with the fields of `Capture` and the installed interventions and probes."""
    from dataclasses import fields

    from interp.capture import Capture
    from interp.probes.discovery import plugins

    schema = Job.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties = schema["properties"]
    names = [f.name for f in fields(Capture)]
    properties["capture"] |= {"properties": {n: {} for n in names}, "additionalProperties": False}
    change = properties["conditions"]["additionalProperties"]["items"]
    change |= {"properties": {"name": {"enum": _names(plugins("interp.interventions"))}}, "required": ["name"]}
    probe = {"enum": _names(plugins("interp.probes"))}
    named = {"type": "object", "properties": {"name": probe}, "required": ["name"]}
    properties["probes"]["items"] = {"anyOf": [probe, named]}
    return schema


def _names(plugins: Iterable[Any]) -> list[str]:
    return sorted({p.name for p in plugins})


__all__ = ["Job", "job_schema", "parse_job", "parse_seeds", "read_job"]

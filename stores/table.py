"""The table of everything a run may hold: writer, `validate`, `synthetic_run` and the docs page follow it."""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

FORMAT = "interp.run/1"
"""Name and major version of the format, kept in the root attribute `format`."""

TODO, DONE, FAILED = 0, 1, 2
"""Values of the root variable `status`."""

Storage = Literal["table", "batch", "sample", "shard", "auto"]
Missing = Literal["never", "allowed", "other branch", "unused token"]

TOKEN_FILL: dict[str, str | int] = {
    "token_text": "",
    "token_id": -1,
    "token_role": "",
    "token_word": -1,
    "token_count": 0,
    "token_text_uncond": "",
}
"""The columns of a token table, and what stands in a column that a short prompt does not use."""

ROLES = ("bos", "word", "eos", "pad", "template")
SCORES_NODE = "scores"


@dataclass(frozen=True)
class Variable:
    """One row of the table: where a variable lives, how it is labelled and stored, and what it means."""

    node: str
    name: str
    dims: tuple[str, ...]
    dtypes: tuple[str, ...]
    storage: Storage
    meaning: str
    units: str = ""
    coord: bool = False
    required: bool = False
    nan: Missing = "allowed"

    @property
    def dtype(self) -> str:
        """The dtype that a builder takes when nothing else is asked for."""
        return self.dtypes[0]

    @property
    def path(self) -> str:
        """Path below the root, with placeholders such as `<h>x<w>`."""
        return f"{self.node}/{self.name}" if self.node else self.name

    def matches(self, path: str) -> bool:
        """Whether the real `path` (`attention/32x32/probs`) is one of this row's."""
        return self._pattern.fullmatch(path) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """The path with anything but a slash for each placeholder."""
        pattern = re.sub(r"<\w+>", "\0", self.path)
        return re.compile(re.escape(pattern).replace(re.escape("\0"), "[^/]+"))


_STR, _INT, _I4, _I1, _F4, _U1 = ("str",), ("int64",), ("int32",), ("int8",), ("float32",), ("uint8",)
_REAL = ("float32", "float16", "float64")
_HALF = ("float16", "float32")
_QUERY = ("query_y", "query_x")
_PER_HEAD = ("sample", "step", "branch", "layer", "head")


def _root() -> tuple[Variable, ...]:
    rows: tuple[tuple[str, tuple[str, ...], Storage, bool, str], ...] = (
        ("prompt", _STR, "table", True, "the text the image was made from"),
        ("negative_prompt", _STR, "table", True, "the text of the `uncond` branch, often empty"),
        ("seed", _INT, "table", True, "seed of the CPU generator that drew the initial noise"),
        ("condition", _STR, "table", True, "name of the list of interventions; `baseline` is the empty one"),
        ("prompt_id", _INT, "table", True, "row of the prompt table"),
        ("batch", _INT, "table", True, "which samples ran together; kept when a run is resumed"),
        ("status", _I1, "batch", True, "0 to do, 1 done, 2 failed; written last, after the data are durable"),
        (
            "error",
            _STR,
            "batch",
            True,
            "why a sample failed, or in what a finished one departs from the plan; one sentence",
        ),
    )
    index = Variable("", "sample", ("sample",), _INT, "table", "number of the sample", "", True, True)
    return index, *(Variable("", n, ("sample",), t, s, m, "", False, r) for n, t, s, r, m in rows)


def _steps(node: str, *, first: str) -> tuple[Variable, ...]:
    return (
        Variable(node, "step", ("step",), _I4, "table", first, "", True, True),
        Variable(node, "timestep", ("step",), _F4, "table", "the scheduler's timestep", "", True, True),
        Variable(node, "sigma", ("step",), _F4, "table", "noise level σ of the step", "1", True),
    )


def _layers(node: str) -> tuple[Variable, ...]:
    head = "`mean`, or the numbers of the heads"
    return (
        Variable(node, "branch", ("branch",), _STR, "table", "`cond` or `uncond`", "", True, True),
        Variable(node, "layer", ("layer",), _STR, "table", "site names of the attention layers", "", True, True),
        Variable(node, "head", ("head",), _STR, "table", head, "", True, True),
    )


def _cells(node: str, *dims: str) -> tuple[Variable, ...]:
    meaning = "which of the grid's positions were kept, if a region was captured"
    return tuple(Variable(node, d, (d,), _I4, "table", meaning, "", True) for d in dims)


def _tokens(node: str, *, always: bool = True) -> tuple[Variable, ...]:
    both = ("sample", "token")
    meanings = {
        "token_text": (_STR, "text of the token; empty for an unused column", True),
        "token_id": (_I4, "id in the tokenizer's vocabulary; -1 unused", True),
        "token_role": (
            _STR,
            "`bos`, `word`, `eos` (the first), `pad`, `template` (fixed words around a prompt); empty for an unused column",
            True,
        ),
        "token_word": (_I4, "which word of the prompt the token belongs to, from 0; -1 none", True),
        "token_count": (_I4, "how many tokens the column sums; more than 1 for padding, 0 unused", True),
        "token_text_uncond": (_STR, "text of the `uncond` branch's token in this column", False),
    }
    return tuple(Variable(node, n, both, t, "table", m, "", True, r and always) for n, (t, m, r) in meanings.items())


def _trajectory() -> tuple[Variable, ...]:
    node, image = "trajectory", ("channel", "y", "x")
    data = "factor of the clean latents: x_t = data_scale·x_0 + noise_scale·ε, in the latents' units"
    return (
        Variable(node, "latents", ("sample", "step", *image), _F4, "sample",
                 "x_t entering the step", "1", nan="never"),
        Variable(node, "final_latents", ("sample", *image), _F4, "sample",
                 "latents after the last step", "1", nan="never"),
        Variable(node, "noise_pred", ("sample", "step", "branch", *image), _F4, "sample",
                 "raw model output (see `prediction_type`); NaN where a branch was not evaluated",
                 "1", nan="other branch"),
        Variable(node, "guidance_scale", ("sample", "step"), _F4, "batch", "guidance really applied", "1"),
        Variable(node, "nfe", ("sample", "branch"), _I4, "batch", "forward passes really run", "1"),
        *_steps(node, first="sampling step, 0 is the first and noisiest"),
        Variable(node, "alpha_bar", ("step",), _F4, "table", "ᾱ; NaN where it has no meaning", "1", True),
        Variable(node, "data_scale", ("step",), _F4, "table", data, "1", True, True, "never"),
        Variable(node, "noise_scale", ("step",), _F4, "table",
                 "factor of the noise ε, likewise", "1", True, True, "never"),
        Variable(node, "branch", ("branch",), _STR, "table", "`cond`, `uncond`", "", True, True),
    )  # fmt: skip


def _attention() -> tuple[Variable, ...]:
    cross, own, back = "attention/<h>x<w>", "self_attention/<h>x<w>", "text_attention/<h>x<w>"
    within = "within_text_attention/<h>x<w>"
    key = ("key_y", "key_x")
    captured = "the captured sampling steps"
    return (
        Variable(cross, "probs", (*_PER_HEAD, "token", *_QUERY), _HALF, "shard",
                 "attention from image positions to tokens, normalised over all keys before any selection",
                 "1", False, True, "unused token"),
        *_steps(cross, first=captured), *_layers(cross), *_tokens(cross), *_cells(cross, *_QUERY),
        Variable(own, "probs", (*_PER_HEAD, *_QUERY, *key), _HALF, "shard",
                 "attention from image positions to image positions", "1", False, True, "never"),
        *_steps(own, first=captured), *_layers(own), *_cells(own, *_QUERY),
        Variable(back, "probs", (*_PER_HEAD, "token", *key), _HALF, "shard",
                 "attention from tokens to image positions, in joint attention",
                 "1", False, True, "unused token"),
        *_steps(back, first=captured), *_layers(back), *_tokens(back),
        Variable(within, "probs", (*_PER_HEAD, "query_token", "token"), _HALF, "shard",
                 "attention from tokens (`query_token`, the same columns) to tokens, in joint attention and within the text",
                 "1", False, True),
        *_steps(within, first=captured), *_layers(within), *_tokens(within),
    )  # fmt: skip


def _rest() -> tuple[Variable, ...]:
    text, site = "text/<encoder>", "sites/<name>"
    embedded = ("sample", "branch", "token", "feature")
    return (
        Variable(site, "value", ("sample", "step", "branch", "..."), _REAL, "auto",
                 "what passed at the site; further dims by kind (channel, y, x or position, feature)"),
        *_tokens(site, always=False), *_cells(site, "position", "y", "x"),
        *_steps(site, first="the captured sampling steps")[:2],
        Variable(site, "branch", ("branch",), _STR, "table", "`cond` or `uncond`", "", True, True),
        Variable(text, "embeddings", embedded, _REAL, "auto", "what the denoiser reads", "1"),
        Variable(text, "pooled", ("sample", "branch", "pooled_feature"), _REAL, "auto",
                 "pooled embedding", "1"),
        Variable(text, "hidden", ("sample", "branch", "layer", "token", "hidden_feature"), _REAL, "auto",
                 "hidden states, embedding layer first", "1"),
        Variable(text, "branch", ("branch",), _STR, "table", "`cond` or `uncond`", "", True, True),
        *_tokens(text),
        Variable("images", "image", ("sample", "height", "width", "rgb"), _U1, "sample",
                 "the image", "1", False, True),
        Variable("images", "thumb", ("sample", "thumb_y", "thumb_x", "rgb"), _U1, "batch",
                 "the image, longest side at most 64", "1"),
        Variable("x0", "image", ("sample", "step", "height", "width", "rgb"), _U1, "shard",
                 "x̂0 decoded: what the model predicts the image to be, at each step; written by `interp score -m x0`",
                 "1", False, True),
        *_steps("x0", first="the decoded sampling steps"),
        Variable(SCORES_NODE, "score", ("sample", "metric"), _F4, "table",
                 "written by `interp score`, named `<metric>:<column>`", "1", False, True),
        Variable(SCORES_NODE, "metric", ("metric",), _STR, "table", "as `clip:prompt`", "", True, True),
    )  # fmt: skip


TABLE: tuple[Variable, ...] = (*_root(), *_trajectory(), *_attention(), *_rest())

ROOT_RESERVED = frozenset({"sample", "status", "error"}) | {v.node.split("/")[0] for v in TABLE if v.node}
"""Names that a column of the prompt table may not have."""


@lru_cache(maxsize=4096)
def find_variable(path: str) -> Variable | None:
    """Return the table's row for a real path such as `attention/32x32/probs`, or None for an extra
    variable.
    """
    return next((v for v in TABLE if v.matches(path)), None)


def node_rows(node: str) -> dict[str, Variable]:
    """Return the rows of one node by variable name; `node` is real (`attention/8x8`) or a pattern, "" the
    root.
    """
    rows = {v.name: v for v in TABLE if v.node == node}
    if rows:
        return rows
    return {v.name: v for v in TABLE if v.matches(f"{node}/{v.name}")}

"""Stored attention against the module as a black box."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from interp.families import PARTS, AttentionSite, Spans
from interp.hooks import At, HookRegistry
from interp.testing.case import FamilyCase
from interp.testing.reference import black_box_attention

Parts = dict[tuple[str, str], torch.Tensor]


def check_probabilities(case: FamilyCase, reference: Callable[..., Any] | None = None) -> None:
    """Every layer, head, token, position and branch of the first and last step, as stored, within the tolerance.

    The rows of each kernel call sum to 1 over all its keys.
    """
    if not case.family.attention_sites():
        return
    run = case.recorded(case.modes[0]).run
    expected, sums = _expected(case, reference or black_box_attention)
    assert sums and np.max(sums) <= case.tolerance, f"rows sum to 1 ± {np.max(sums):.2g}"
    compared = set()
    for (name, step, branch), (site, parts, spans) in expected.items():
        for part, queries, keys in _pairs(site, parts):
            want = parts[queries, keys]
            if site.kind == "joint":
                own, over = spans.part(part)
                want = want[:, :, _within(own, queries, parts, spans), _within(over, keys, parts, spans)]
            node = run.tree[_NODES[part]]
            stored = next(g["probs"].sel(layer=name) for g in node.children.values() if name in g["probs"].layer.values)
            got = torch.from_numpy(stored.isel(step=0 if step == 0 else -1).sel(branch=branch).values)
            _compare(case, got, want, part, f"{name}, step {step}, {branch}, {part}")
            compared.add((name, part))
    # a last block that drops its text gives no output of the text to read off
    missing = {(s.name, p) for s in case.family.attention_sites() for p in PARTS[s.kind]} - compared
    assert all("text" in part for _, part in missing), f"not compared: {sorted(missing)}"


_NODES = {
    "cross": "attention", "self": "self_attention", "text": "text_attention", "within_text": "within_text_attention",
}  # fmt: skip


def _pairs(site: AttentionSite, parts: Parts) -> list[tuple[str, str, str]]:
    """Part, and which streams of the black box hold its queries and keys."""
    if site.kind != "joint" or ("own", "added") not in parts:
        return [(part, "own", "own") for part in PARTS[site.kind]]
    pairs = [
        ("cross", "own", "added"),
        ("self", "own", "own"),
        ("text", "added", "own"),
        ("within_text", "added", "added"),
    ]
    return [p for p in pairs if p[1:] in parts]


def _within(span: slice, stream: str, parts: Parts, spans: Spans) -> slice:
    """Where a span of the whole sequence lies in the black box's stream; the text's may hold more than the prompt."""
    assert spans.image_keys is not None and spans.text_keys is not None
    first = "added" if spans.text_keys.start < spans.image_keys.start else "own"
    if ("own", "added") not in parts or stream == first:  # one sequence, or the stream that comes first
        return span
    before = parts[first, first].shape[-1] if (first, first) in parts else parts["own", first].shape[-1]
    return slice(span.start - before, span.stop - before)


def _compare(case: FamilyCase, got: torch.Tensor, want: torch.Tensor, part: str, where: str) -> None:
    """Bring what is stored into the order (sample, head, query, key), and compare."""
    if part == "cross":  # (sample, head, token, y, x)
        got = got.flatten(-2).transpose(-1, -2)
    elif part == "text":
        got = got.flatten(-2)
    elif part == "self":
        got = got.flatten(-2).flatten(-3, -2)
    # columns beyond a sample's own tokens are NaN, and masked in the kernel
    for tokens in {"cross": [-1], "text": [-2], "within_text": [-1, -2]}.get(part, []):
        length = min(want.shape[tokens], got.shape[tokens])
        got, want = got.narrow(tokens, 0, length), want.narrow(tokens, 0, length)
    if part != "self" and got.shape == want.shape:
        want = torch.where(torch.isnan(got), want.new_full((), float("nan")), want)
    assert got.shape == want.shape, f"{where}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    assert torch.equal(got.isnan(), want.isnan()), f"{where}: gaps"
    off = float((got - want).nan_to_num().abs().max())
    assert off <= case.tolerance, f"{where}: off by {off:.2g}"
    flat = float(want.nanmean())  # what each key gets of this part on average; in a softmax of its own, 1 / keys
    assert float(want.nan_to_num().max()) > 3 * flat, f"{where}: too flat for a check; scale the queries up"


def _expected(case: FamilyCase, reference: Callable[..., Any]) -> tuple[dict[tuple[str, int, str], Any], list[float]]:
    """(site, step, branch) → site, black-box parts of the branch's rows, and spans; of the first and last step.

    Beside it, how far the rows of each kernel call of the first step are from summing to 1.
    """
    family, calls = case.family, []
    order: list[tuple[int, tuple[str, ...]]] = []
    inside: list[int] = []
    sums: list[float] = []

    def total(probs: torch.Tensor, at: At) -> None:
        sums.append(float((probs.sum(-1) - 1).abs().max()))

    def keep(site: AttentionSite) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append((len(inside) - 1, site, *_cloned((args, kwargs))))

        return hook

    handles = [s.module.register_forward_pre_hook(keep(s), with_kwargs=True) for s in family.attention_sites()]
    denoiser_kwargs: list[dict] = []

    def enter(_: Any, args: tuple, kwargs: dict) -> None:
        inside.append(1)
        denoiser_kwargs.append(dict(kwargs))

    handles.append(family.denoiser.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        with HookRegistry(case.pipe) as hooks:  # for the order of the branches alone; another check proves it
            hooks.on_call(lambda call: order.append((call.step, call.branches)))
            hooks.read("*:probs", total, steps=[0])
            case.call()
    finally:
        for handle in handles:
            handle.remove()
    last = max(step for step, _ in order)
    found: dict[tuple[str, int, str], Any] = {}
    with torch.no_grad():
        for number, site, args, kwargs in calls:
            step, branches = order[number]
            if step not in (0, last) or (site.name, step, branches[-1]) in found:
                continue
            parts = reference(site.module, args, kwargs, site.heads)
            queries, keys = (max(sum(t.shape[i] for t in _streams(parts, i)), 1) for i in (2, 3))
            queries = keys if site.kind == "joint" else queries  # also where a last block gives no output for its text
            spans = family.spans(site, queries, keys, denoiser_kwargs[number])
            for i, branch in enumerate(branches):
                rows = {pair: t.chunk(len(branches))[i] for pair, t in parts.items()}
                found[site.name, step, branch] = (site, rows, spans)
    return found, sums


def _streams(parts: Parts, dim: int) -> list[torch.Tensor]:
    """One tensor for each stream of queries (dim 2) or keys (dim 3)."""
    seen: dict[str, torch.Tensor] = {}
    for (queries, keys), tensor in parts.items():
        seen.setdefault(queries if dim == 2 else keys, tensor)
    return list(seen.values())


def _cloned(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, (tuple, list)):
        return type(tree)(_cloned(x) for x in tree)
    if isinstance(tree, dict):
        return {k: _cloned(v) for k, v in tree.items()}
    return tree

"""Prompts against what the denoiser reads: states, tokens, and the keys they are read at."""

from typing import Any

import torch

from interp.errors import InterpError
from interp.families import EncodedPrompt
from interp.hooks import DenoiserCall, HookRegistry
from interp.testing.case import FamilyCase, close
from interp.testing.places import Enough


def check_text(case: FamilyCase) -> None:
    """The text states of a branch are those of its prompts, and the tokens are as many as the states."""
    family, arguments = case.family, case.arguments()
    if not family.text_segments(arguments):
        _refused(case)
        return
    run = case.recorded(case.modes[0]).run
    prompts = {"cond": list(case.prompts), "uncond": [case.negative if family.takes_negative else ""] * 2}
    if case.guided is None:
        del prompts["uncond"]
    for branch, texts in prompts.items():
        given = arguments if branch == "cond" else family.negative_arguments(arguments)
        encoded = family.encode(texts, given)
        assert not encoded.embeddings.requires_grad
        for name, span in family.text_segments(arguments).items():
            stored = torch.from_numpy(run.tree[f"text/{name}"]["embeddings"].sel(branch=branch).values)
            want = encoded.embeddings[:, span].float()
            got, what = stored[:, : want.shape[1]], f"{branch}: the states are not those of {texts}"
            assert torch.equal(got.isnan(), want.isnan()), f"{what}: gaps"
            close(got.nan_to_num(), want.nan_to_num(), case.tolerance, what)
            assert torch.isnan(stored[:, want.shape[1] :]).all()
    for prompt in case.prompts:
        tokens = family.tokenize(prompt, arguments)
        assert len(tokens.ids) == len(tokens.role) == len(tokens.word) <= family.text_length(arguments)
        for name, span in family.text_segments(arguments).items():
            part = tokens.part(span)
            spoken = "".join(t for t, role in zip(part.text, part.role, strict=True) if role == "word")
            assert spoken.replace(" ", "") == prompt.replace(" ", ""), f"{name}: the tokens spell {spoken!r}"
            named = [part.words[w] for w in dict.fromkeys(w for w in part.word if w >= 0)]
            assert named == prompt.split(), f"{name}: the words of {prompt!r} came out as {named}"


def _refused(case: FamilyCase) -> None:
    """Where the text lies is unknown: whoever asks for it is told."""
    try:
        case.family.encode(list(case.prompts), case.arguments())
    except InterpError:
        return
    raise AssertionError("the family names no positions of the text, but encodes prompts")


def check_text_positions(case: FamilyCase) -> None:
    """A token's state is read at its own key, and nowhere else in the text: tokens and keys are of one order."""
    family = case.family
    site = next((s for s in family.attention_sites() if s.kind in ("cross", "joint")), None)
    if site is None:
        return
    tokens = family.tokenize(case.prompts[0], case.arguments())
    words = [position for position, role in enumerate(tokens.role) if role == "word"]
    plain, *others = (_keys(case, site, position) for position in (None, words[0], words[-1]))
    for position, other in zip((words[0], words[-1]), others, strict=True):
        moved = (other - plain).float().norm(dim=-1).mean(0)
        assert int(moved.argmax()) == position, (
            f"{site.name}: the state of token {position} is read at the text's key {int(moved.argmax())}"
        )


def _keys(case: FamilyCase, site: Any, position: int | None) -> torch.Tensor:
    """The text's keys of the first prompt, (head, key, feature), where the state of one position is another."""
    family, found = case.family, []

    def keep(kernel: Any, call: DenoiserCall) -> None:
        if "cond" in call.branches and kernel.call == 0 and kernel.key is not None:
            row = call.branches.index("cond") * call.samples
            found.append(kernel.key[row, :, hooks.spans(kernel, call).text_keys].detach().clone())
            raise Enough

    def change(call: DenoiserCall) -> None:
        if position is None or "cond" not in call.branches:
            return
        text, row = family.text_inputs(call.kwargs), call.branches.index("cond") * call.samples
        states = text.embeddings.clone()
        states[row, position] = states[row, position].flip(-1)
        call.kwargs = family.with_text(call.kwargs, EncodedPrompt(states, text.pooled, text.mask))

    with HookRegistry(case.pipe) as hooks:
        hooks.on_call(change)
        hooks.on_attention(site, keep)
        try:
            case.call()
        except Enough:
            return found[0]
    raise AssertionError(f"{site.name} did not run")

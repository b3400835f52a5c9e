"""Prompts against what the denoiser reads: states, tokens, and the keys they are read at."""

from typing import Any

import torch

from interp.capture import Capture
from interp.families import EncodedPrompt
from interp.hooks import DenoiserCall, HookRegistry
from interp.recording import record
from interp.testing.case import FamilyCase, close


def check_text(case: FamilyCase) -> None:
    """The text states of a branch are those of its prompts, and the tokens are as many as the states."""
    family = case.family
    with record(case.pipe, capture=Capture(attention=None, image=False, text=True)) as recording:
        case.call()
    arguments = case.arguments()
    prompts = {"cond": list(case.prompts), "uncond": [case.negative if family.takes_negative else ""] * 2}
    if case.guided is None:
        del prompts["uncond"]
    for branch, texts in prompts.items():
        given = arguments if branch == "cond" else family.negative_arguments(arguments)
        encoded = family.encode(texts, given)
        assert not encoded.embeddings.requires_grad
        for name, span in family.text_segments(arguments).items():
            stored = torch.from_numpy(recording.run.tree[f"text/{name}"]["embeddings"].sel(branch=branch).values)
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


def check_text_positions(case: FamilyCase) -> None:
    """A token's state is read at its own key, and nowhere else in the text: tokens and keys are of one order."""
    family = case.family
    site = next((s for s in family.attention_sites() if s.kind in ("cross", "joint")), None)
    if site is None:
        return
    tokens = family.tokenize(case.prompts[0], case.arguments())
    words = [position for position, role in enumerate(tokens.role) if role == "word"]
    keys: list[torch.Tensor] = []

    def keep(kernel: Any, call: DenoiserCall) -> None:
        if (
            call.step == 0
            and call.evaluation == 0
            and "cond" in call.branches
            and kernel.call == 0
            and kernel.key is not None
        ):
            row = call.branches.index("cond") * call.samples
            keys.append(kernel.key[row, :, hooks.spans(kernel, call).text_keys].detach().clone())

    for position in (None, words[0], words[-1]):

        def change(call: DenoiserCall, position: int | None = position) -> None:
            if position is None or "cond" not in call.branches:
                return
            text, row = family.text_inputs(call.kwargs), call.branches.index("cond") * call.samples
            states = text.embeddings.clone()
            states[row, position] = states[row, position].flip(-1)
            call.kwargs = family.with_text(call.kwargs, EncodedPrompt(states, text.pooled, text.mask))

        with HookRegistry(case.pipe) as hooks:
            hooks.on_call(change)
            hooks.on_attention(site, keep)
            case.call(num_inference_steps=2)
    plain, *others = keys
    for position, other in zip((words[0], words[-1]), others, strict=True):
        moved = (other - plain).float().norm(dim=-1).mean(0)
        assert int(moved.argmax()) == position, (
            f"{site.name}: the state of token {position} is read at the text's key {int(moved.argmax())}"
        )

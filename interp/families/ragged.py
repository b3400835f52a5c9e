"""Text states of prompts of different lengths: NaN where a prompt has no state, and a mask that tells."""

import torch

from interp.families.facts import EncodedPrompt


def with_gaps(embeddings: torch.Tensor, mask: torch.Tensor | None) -> EncodedPrompt:
    """Return states (sample, token, feature) that are NaN where the mask (sample, token) is 0; no mask is ones."""
    if mask is None:
        return EncodedPrompt(
            embeddings, mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        )
    return EncodedPrompt(embeddings.masked_fill(mask[..., None] == 0, float("nan")), mask=mask.long())


def stacked(states: list[torch.Tensor]) -> EncodedPrompt:
    """Return states of several prompts, (token, feature) each, as one."""
    mask = [torch.ones(len(s), dtype=torch.long, device=s.device) for s in states]
    pad = torch.nn.utils.rnn.pad_sequence
    return EncodedPrompt(pad(states, batch_first=True, padding_value=float("nan")), mask=pad(mask, batch_first=True))


def apart(text: EncodedPrompt) -> list[torch.Tensor]:
    """Return the states of each prompt, (token, feature), without gaps: the inverse of `stacked`."""
    if text.mask is None:
        return list(text.embeddings)
    return [states[mask > 0] for states, mask in zip(text.embeddings, text.mask, strict=True)]


def lengthened(text: EncodedPrompt, length: int) -> EncodedPrompt:
    """Return the states with gaps at the end, up to so many positions at least."""
    more, pad = max(0, length - text.embeddings.shape[1]), torch.nn.functional.pad
    mask = None if text.mask is None else pad(text.mask, (0, more))
    return EncodedPrompt(pad(text.embeddings, (0, 0, 0, more), value=float("nan")), mask=mask)


def trimmed(text: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states and mask without gaps but at the end, no longer than the longest prompt."""
    again = stacked(apart(text))
    assert again.mask is not None
    return again.embeddings, again.mask

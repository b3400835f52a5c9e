"""Model families: the facts about a pipeline that must be known, never guessed."""

from interp.families.base import Family
from interp.families.facts import (
    PARTS,
    Arguments,
    AttentionSite,
    DenoiserInputs,
    EncodedPrompt,
    Pass,
    Spans,
)
from interp.families.finding import families, find_family, trying

__all__ = [
    "PARTS",
    "Arguments",
    "AttentionSite",
    "DenoiserInputs",
    "EncodedPrompt",
    "Family",
    "Pass",
    "Spans",
    "families",
    "find_family",
    "trying",
]

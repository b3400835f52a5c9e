"""Model families: the facts about a pipeline that must be known, never guessed."""

from interp.families.base import AttentionSite, EncodedPrompt, Family, find_family

__all__ = ["AttentionSite", "EncodedPrompt", "Family", "find_family"]

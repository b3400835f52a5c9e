"""Interventions: changes of a sampling run, listed in the call, written into the run, undone afterwards."""

from interp.interventions.base import Batch, Intervention, attach_all, check_all, from_spec
from interp.interventions.functions import Edit, NNsightEdit
from interp.interventions.guidance import RemoveGuidance, RemoveText
from interp.interventions.text import ReplaceEOS, ReplacePrompt
from interp.interventions.token_states import ReplaceTokens

__all__ = [
    "Batch",
    "Edit",
    "Intervention",
    "NNsightEdit",
    "RemoveGuidance",
    "RemoveText",
    "ReplaceEOS",
    "ReplacePrompt",
    "ReplaceTokens",
    "attach_all",
    "check_all",
    "from_spec",
]

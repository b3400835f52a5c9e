"""Interventions: changes of a sampling run, listed in the call, written into the run, undone afterwards."""

from interp.interventions.base import Batch, Intervention, attach_all, check_all, from_spec
from interp.interventions.functions import Edit, NNsightEdit
from interp.interventions.guidance import RemoveGuidance, RemoveText
from interp.interventions.text import ReplaceEOS, ReplacePrompt

__all__ = [
    "Batch",
    "Edit",
    "Intervention",
    "NNsightEdit",
    "RemoveGuidance",
    "RemoveText",
    "ReplaceEOS",
    "ReplacePrompt",
    "attach_all",
    "check_all",
    "from_spec",
]

"""Interventions: changes of a sampling run, listed in the call, written into the run, undone afterwards."""

from interp.interventions.adding import AddNoise, Steer
from interp.interventions.attention import AblateHeads
from interp.interventions.base import Batch, Intervention, attach_all, from_spec
from interp.interventions.caching import CacheCrossAttention
from interp.interventions.checking import check_all, evaluated_branches
from interp.interventions.encoder import EncoderLayer
from interp.interventions.functions import Edit, NNsightEdit
from interp.interventions.guidance import (
    AdaptiveGuidance,
    GuidanceInterval,
    GuidanceScale,
    RemoveGuidance,
    RemoveText,
)
from interp.interventions.injection import InjectAttention, prompt_to_prompt
from interp.interventions.other_prompt import ReplaceEOS, ReplacePrompt
from interp.interventions.places import neighbours
from interp.interventions.replacing import Ablate, Patch
from interp.interventions.token_states import ReplaceTokens
from interp.interventions.token_weights import ScaleAttention, SetAttention
from interp.interventions.vectors import steering_vector

__all__ = [
    "Ablate",
    "AblateHeads",
    "AdaptiveGuidance",
    "AddNoise",
    "Batch",
    "CacheCrossAttention",
    "Edit",
    "EncoderLayer",
    "GuidanceInterval",
    "GuidanceScale",
    "InjectAttention",
    "Intervention",
    "NNsightEdit",
    "Patch",
    "RemoveGuidance",
    "RemoveText",
    "ReplaceEOS",
    "ReplacePrompt",
    "ReplaceTokens",
    "ScaleAttention",
    "SetAttention",
    "Steer",
    "attach_all",
    "check_all",
    "evaluated_branches",
    "from_spec",
    "neighbours",
    "prompt_to_prompt",
    "steering_vector",
]

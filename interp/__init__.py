"""Trace, probe and intervene on text-to-image diffusion pipelines.

Importing `interp` loads neither torch nor diffusers: each name below is imported from its home when it is
first used (PEP 562), so that `interp.stores` and `interp.probes` stay light on machines without a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "load": "interp.loading",
    "sites": "interp.catalog",
    "plan": "interp.planning",
    "Plan": "interp.planning",
    "trace": "interp.tracing",
    "record": "interp.recording",
    "encode_image": "interp.encoding",
    "nnsight": "interp.envoy",
    "Capture": "interp.capture",
    "HookRegistry": "interp.hooks",
    "At": "interp.hooks",
    "score": "interp.scoring",
    "sweep": "interp.sweeping",
    "Intervention": "interp.interventions",
    "AdaptiveGuidance": "interp.interventions",
    "CacheCrossAttention": "interp.interventions",
    "GuidanceInterval": "interp.interventions",
    "GuidanceScale": "interp.interventions",
    "Ablate": "interp.interventions",
    "AddNoise": "interp.interventions",
    "Patch": "interp.interventions",
    "Steer": "interp.interventions",
    "AblateHeads": "interp.interventions",
    "ScaleAttention": "interp.interventions",
    "SetAttention": "interp.interventions",
    "InjectAttention": "interp.interventions",
    "prompt_to_prompt": "interp.interventions",
    "Edit": "interp.interventions",
    "EncoderLayer": "interp.interventions",
    "NNsightEdit": "interp.interventions",
    "RemoveText": "interp.interventions",
    "RemoveGuidance": "interp.interventions",
    "ReplaceEOS": "interp.interventions",
    "ReplacePrompt": "interp.interventions",
    "ReplaceTokens": "interp.interventions",
    "InterpError": "interp.errors",
    "open_run": "interp.stores",
    "Run": "interp.stores",
}

__all__ = [
    "Ablate",
    "AblateHeads",
    "AdaptiveGuidance",
    "AddNoise",
    "At",
    "CacheCrossAttention",
    "Capture",
    "Edit",
    "EncoderLayer",
    "GuidanceInterval",
    "GuidanceScale",
    "HookRegistry",
    "InjectAttention",
    "InterpError",
    "Intervention",
    "NNsightEdit",
    "Patch",
    "Plan",
    "RemoveGuidance",
    "RemoveText",
    "ReplaceEOS",
    "ReplacePrompt",
    "ReplaceTokens",
    "Run",
    "ScaleAttention",
    "SetAttention",
    "Steer",
    "__version__",
    "encode_image",
    "load",
    "nnsight",
    "open_run",
    "plan",
    "prompt_to_prompt",
    "record",
    "score",
    "sites",
    "sweep",
    "trace",
]

if TYPE_CHECKING:
    from interp.capture import Capture as Capture
    from interp.catalog import sites as sites
    from interp.encoding import encode_image as encode_image
    from interp.envoy import nnsight as nnsight
    from interp.errors import InterpError as InterpError
    from interp.hooks import At as At
    from interp.hooks import HookRegistry as HookRegistry
    from interp.interventions import Ablate as Ablate
    from interp.interventions import AblateHeads as AblateHeads
    from interp.interventions import AdaptiveGuidance as AdaptiveGuidance
    from interp.interventions import AddNoise as AddNoise
    from interp.interventions import CacheCrossAttention as CacheCrossAttention
    from interp.interventions import Edit as Edit
    from interp.interventions import EncoderLayer as EncoderLayer
    from interp.interventions import GuidanceInterval as GuidanceInterval
    from interp.interventions import GuidanceScale as GuidanceScale
    from interp.interventions import InjectAttention as InjectAttention
    from interp.interventions import Intervention as Intervention
    from interp.interventions import NNsightEdit as NNsightEdit
    from interp.interventions import Patch as Patch
    from interp.interventions import RemoveGuidance as RemoveGuidance
    from interp.interventions import RemoveText as RemoveText
    from interp.interventions import ReplaceEOS as ReplaceEOS
    from interp.interventions import ReplacePrompt as ReplacePrompt
    from interp.interventions import ReplaceTokens as ReplaceTokens
    from interp.interventions import ScaleAttention as ScaleAttention
    from interp.interventions import SetAttention as SetAttention
    from interp.interventions import Steer as Steer
    from interp.interventions import prompt_to_prompt as prompt_to_prompt
    from interp.loading import load as load
    from interp.planning import Plan as Plan
    from interp.planning import plan as plan
    from interp.recording import record as record
    from interp.scoring import score as score
    from interp.stores import Run as Run
    from interp.stores import open_run as open_run
    from interp.sweeping import sweep as sweep
    from interp.tracing import trace as trace
else:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        if name in ("stores", "probes", "scenes"):
            return import_module(f"interp.{name}")
        raise AttributeError(f"module 'interp' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")

    def __dir__() -> list[str]:
        return sorted({*__all__, "probes", "scenes", "stores"})

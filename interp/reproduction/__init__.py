"""The experiments of Yi et al. (arXiv:2405.15330) by one command: runs, numbers with intervals, verdicts, a report.

`reproduce` makes a few resumable runs, asks the probes, and writes `report.html`, `numbers.json` and `summary.csv`
beside them. The same call again makes what is missing and builds the report anew.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "reproduce": "interp.reproduction.driver",
    "Settings": "interp.reproduction.settings",
    "PromptSet": "interp.reproduction.prompt_sets",
    "compbench": "interp.reproduction.prompt_sets",
    "coco_captions": "interp.reproduction.prompt_sets",
    "choose_pairs": "interp.reproduction.prompt_sets",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from interp.reproduction.driver import reproduce as reproduce
    from interp.reproduction.prompt_sets import PromptSet as PromptSet
    from interp.reproduction.prompt_sets import choose_pairs as choose_pairs
    from interp.reproduction.prompt_sets import coco_captions as coco_captions
    from interp.reproduction.prompt_sets import compbench as compbench
    from interp.reproduction.settings import Settings as Settings
else:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'interp.reproduction' has no attribute {name!r}; it has: {', '.join(__all__)}")

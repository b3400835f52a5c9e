"""`scenes`, the bundled model organism: a miniature Stable Diffusion trained on drawn scenes, and its judges.

>>> from interp.scenes import folder
>>> (folder() / "model_index.json").exists()
True

The folder is a genuine diffusers `StableDiffusionPipeline`. Importing this package loads no torch: each name is
imported from its home when it is first used (PEP 562).
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

# Chosen from a grid (docs/scenes.md): more steps or more guidance change the judge's figures by less than a percent.
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 5.0

_HOME = {
    "alignment": "interp.scenes.scoring",
    "judge": "interp.scenes.scoring",
    "agreement": "interp.scenes.scoring",
    "Verdict": "interp.scenes.grammar",
    "draw": "interp.scenes.world",
    "prompts": "interp.scenes.captions",
    "pairs": "interp.scenes.captions",
}

__all__ = ["DEFAULT_GUIDANCE", "DEFAULT_STEPS", "folder", *sorted(_HOME)]

if TYPE_CHECKING:
    from interp.scenes.captions import pairs as pairs
    from interp.scenes.captions import prompts as prompts
    from interp.scenes.grammar import Verdict as Verdict
    from interp.scenes.scoring import agreement as agreement
    from interp.scenes.scoring import alignment as alignment
    from interp.scenes.scoring import judge as judge
    from interp.scenes.world import draw as draw
else:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'interp.scenes' has no attribute {name!r}; it has: {', '.join(__all__)}")

    def __dir__() -> list[str]:
        return list(__all__)


def folder() -> Path:
    """Return the folder of the trained pipeline, for `StableDiffusionPipeline.from_pretrained(folder())`.

    Beside the pipeline's parts it holds `clip/`, the CLIP model it was trained with, and `judge/`, the attribute
    judge that shares no weights with either.
    """
    return Path(__file__).with_name("weights")

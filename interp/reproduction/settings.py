"""How large a reproduction is, and which points its sweeps have."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interp.errors import InterpError

FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """What is asked of `reproduce`; written beside the runs, since runs of other settings cannot be mixed with them.

    Args:
        model: As `interp.load` accepts by name: "scenes", a folder, a Hub id.
        pairs: Pairs (A, B) of S-PromptSet; each gives two exchanged pictures.
        steps: Sampling steps of DDIM, or of the model's own scheduler.
        seed: Of the initial noise, which is that of every prompt and condition.
        guidance_scale: None is the model's own.
        size: Height and width of the pictures in pixels; None is the model's own.
        attention_prompts: Prompts whose cross-attention is kept (E1, E3, E10 and the KL test of E13), an even number.
        trajectory_prompts: Prompts whose latents and noise predictions are kept (E2, E7).
        shares: Lengths of the windows of E5, E6 and E8, in shares of the steps.
        prompts: A folder of T2I-CompBench's text files, or None (see `choose_pairs`).
        coco: COCO's caption file for E8, or None for the prompts of the pairs.
        clip_model: The CLIP that scores pictures of other models than scenes.
        blip_model: The BLIP that judges them beside CLIP, and then decides; None is CLIP alone.
        batch_size: Samples that run together.
    """

    model: str = "scenes"
    pairs: int = 256
    steps: int = 50
    seed: int = 0
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    attention_prompts: int = 64
    trajectory_prompts: int = 256
    shares: tuple[float, ...] = (0.04, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    prompts: str | None = None
    coco: str | None = None
    clip_model: str | None = None
    blip_model: str | None = None
    batch_size: int | str = "auto"
    resamples: int = field(default=2000, compare=False)

    def __post_init__(self) -> None:
        for name in ("pairs", "steps", "attention_prompts", "trajectory_prompts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 2:
                raise InterpError(f"reproduce: {name}={value!r}; give a whole number of at least 2")
        if not self.shares or not all(isinstance(s, float) and 0 < s < 1 for s in self.shares):
            raise InterpError(f"reproduce: shares={self.shares!r}; give shares of the steps between 0 and 1")
        if self.steps < 4:
            raise InterpError(f"reproduce: steps={self.steps}; windows of a run need at least 4 steps")

    def lengths(self, shares: tuple[float, ...] | None = None) -> list[int]:
        """Return the windows' lengths in steps, each at least one step and less than all, without repeats."""
        wanted = self.shares if shares is None else shares
        return sorted({n for s in wanted if 0 < (n := max(1, round(s * self.steps))) < self.steps})

    def length(self, share: float) -> int:
        """Return the length of the sweep that is nearest to a share of the steps."""
        return min(self.lengths(), key=lambda n: abs(n - share * self.steps))

    def keep(self, folder: Path) -> None:
        """Write the settings into the folder, or, once it has a run, check that they are those that are there.

        Raises InterpError when the folder holds something else, or a reproduction of other settings.
        """
        path, mine = folder / FILE, self._asked()
        if path.is_file() and any(folder.glob("*.zarr")):
            there = json.loads(path.read_text(encoding="utf-8"))
            for name in mine:
                if there.get(name) != mine[name]:
                    raise InterpError(
                        f"{str(folder)!r} holds a reproduction with {name}={there.get(name)!r}, and {mine[name]!r} was "
                        "asked for; give another folder by --out, or the same settings"
                    )
            return
        if folder.is_file() or (folder.is_dir() and any(p.name != FILE for p in folder.iterdir())):
            raise InterpError(f"{str(folder)!r} holds something else; give a new or empty folder by --out")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")

    def _asked(self) -> dict[str, Any]:
        values = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in values.items() if name != "resamples"}


def quick(model: str = "scenes", **changes: Any) -> Settings:
    """Return small settings, for two cores and a few minutes: intervals are wide, and verdicts often open."""
    small: dict[str, Any] = {
        "pairs": 5, "steps": 10, "attention_prompts": 4, "trajectory_prompts": 5, "shares": (0.1, 0.2, 0.4, 0.6),
    }  # fmt: skip
    return Settings(**{"model": model, **small, **changes})

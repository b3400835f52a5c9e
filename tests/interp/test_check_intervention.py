"""check_intervention passes for every installed intervention, on five kinds of pipelines, and each check can fail.

Whoever adds an intervention adds a line to EXAMPLES: a test fails as long as one is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch

import interp
from interp.interventions.testing import PROMPTS, check_intervention
from interp.probes.discovery import plugins
from tests.families.pipelines import tiny

SHORT = {"max_sequence_length": 24}
CALLS: dict[str, dict[str, Any]] = {
    "sd1": {}, "sdxl": {}, "pixart_alpha": {"options": {**SHORT, "use_resolution_binning": False}}, "sd3": {"options": SHORT},
    "flux": {"options": {**SHORT, "true_cfg_scale": 3.0}},
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A pipeline that interventions are tried on, and names of places in it."""

    name: str

    @property
    def pipe(self) -> Any:
        return tiny(self.name)

    @property
    def site(self) -> str:
        return "unet.mid_block:out" if hasattr(self.pipe, "unet") else "transformer.transformer_blocks.0:out"

    @property
    def channels(self) -> int:
        return int(
            interp.sites(self.pipe, self.site)[0].shape[-1 if self.name in ("pixart_alpha", "sd3", "flux") else 0]
        )

    @property
    def embedded(self) -> str:
        """The token embeddings of the encoder whose states the denoiser reads."""
        ends = {"sd1": "embeddings:out", "sdxl": "embeddings:out", "pixart_alpha": "encoder.embed_tokens:out"}
        other = {"sd3": "text_encoder.text_model.embeddings:out", "flux": "text_encoder_2.encoder.embed_tokens:out"}
        return other.get(self.name) or f"text_encoder.{ends[self.name]}"

    @property
    def crossing(self) -> bool:
        """Whether it has cross-attention, rather than joint."""
        return self.name not in ("sd3", "flux")

    def stored(self) -> interp.Run:
        return stored(self.name)


@cache
def attended(name: str) -> interp.Run:
    """Like `stored`, with its attention."""
    capture = interp.Capture(heads="all", tokens="all", dtype="float32", image=False)
    prompts = [{"prompt": row["target"]} for row in PROMPTS]
    return interp.trace(
        tiny(name), prompts, seeds=0, steps=2, guidance_scale=4.0, height=16, width=16, capture=capture,
        options=CALLS[name].get("options"), progress=False,
    )  # fmt: skip


@cache
def stored(name: str) -> interp.Run:
    """A run of other prompts, by number and seed those of the checks, that holds the bench's site."""
    bench = Bench(name)
    capture = interp.Capture(attention=None, image=False, sites=(bench.site,), branches=("cond", "uncond"))
    prompts = [{"prompt": row["target"]} for row in PROMPTS]
    return interp.trace(
        bench.pipe, prompts, seeds=0, steps=2, guidance_scale=4.0, height=16, width=16, capture=capture,
        options=CALLS[name].get("options"), progress=False,
    )  # fmt: skip


Example = Callable[[Bench], interp.Intervention | None]
EXAMPLES: dict[str, list[Example]] = {
    "ablate": [
        lambda b: interp.Ablate(b.site, branch="both"),
        lambda b: interp.Ablate(b.site, "mean", region=(0, 0, 0.5, 1)),
    ],
    "ablate_heads": [lambda b: interp.AblateHeads("cross", "mean", heads=(0,))],
    "add_noise": [
        lambda b: interp.AddNoise(b.site, scale=2.0),
        lambda b: interp.AddNoise(b.embedded, scale=3.0, tokens=("red", "eos")),
    ],
    "adaptive_guidance": [lambda b: interp.AdaptiveGuidance(threshold=-1.0)],
    "cache_cross_attention": [lambda b: interp.CacheCrossAttention() if b.crossing else None],  # joint: no such outputs
    "encoder_layer": [lambda b: interp.EncoderLayer(0)],
    "guidance_interval": [lambda b: interp.GuidanceInterval(start=0.5, unit="fraction")],
    "guidance_scale": [lambda b: interp.GuidanceScale(2.0)],
    "inject_attention": [lambda b: interp.InjectAttention(attended(b.name))],
    "patch": [lambda b: interp.Patch(b.stored(), b.site, branch="both")],
    "remove_guidance": [lambda b: interp.RemoveGuidance(start=0.5)],
    "remove_text": [lambda b: interp.RemoveText()],
    "replace_eos": [lambda b: interp.ReplaceEOS("{target}")],
    "replace_prompt": [
        lambda b: interp.ReplacePrompt("{target}"),
        lambda b: interp.ReplacePrompt("{target}", layers="*", side="v") if b.crossing else None,  # no layers to choose
    ],
    "replace_tokens": [lambda b: interp.ReplaceTokens(words=("red",), value="random")],
    "scale_attention": [lambda b: interp.ScaleAttention("red", scale=5.0)],
    "set_attention": [lambda b: interp.SetAttention(roles="eos", renormalise=True)],
    "steer": [lambda b: interp.Steer(b.site, [1.0] * b.channels, coefficient=5.0)],
}
"""Examples by name, each for every bench; None where a pipeline has no such thing, with the reason beside it."""


def test_every_installed_intervention_has_an_example():
    names = {p.name for p in plugins("interp.interventions") if p.distribution == "interp-diffusion"}
    assert names == set(EXAMPLES)


ALL = [(name, i) for name, several in EXAMPLES.items() for i in range(len(several))]
CHECKS = [str(c) for c in check_intervention(interp.RemoveText(), tiny("sd1"))]
OTHERS = {"sdxl": ["identity", "window"], "pixart_alpha": ["identity", "window"],
          "sd3": ["identity", "window"], "flux": ["identity", "window", "forward passes"]}  # fmt: skip


def checked(bench: str, name: str, number: int, only: list[str]) -> None:
    change = EXAMPLES[name][number](Bench(bench))
    if change is None:
        return
    assert change.name == name
    checks = list(check_intervention(change, tiny(bench), only=only, size=(16, 16), **CALLS[bench]))
    assert [str(c) for c in checks] == only
    for check in checks:
        try:
            check()
        except Exception as error:
            raise AssertionError(f"{change!r} on {bench}: {check}: {error}") from error


BARE = [c for c in CHECKS if not c.startswith("window with")]
HEUN = [*BARE, "window with Heun"]
"""All find their steps in the same timeline: one of each kind has every scheduler, the others that of second order."""
EVERY_SCHEDULER = ("remove_text", "steer", "set_attention", "replace_prompt", "cache_cross_attention")
PATCHED = [c for c in BARE if c != "spec"]
"""A source lives in memory here, and holds the noise levels of one scheduler: test_activations has the rest."""


@pytest.mark.parametrize(("name", "number"), ALL, ids=str)
def test_every_check_on_stable_diffusion_1(name: str, number: int) -> None:
    whole = CHECKS if name in EVERY_SCHEDULER else HEUN
    checked("sd1", name, number, PATCHED if name in ("patch", "inject_attention") else BARE if number else whole)


@pytest.mark.parametrize("bench", list(OTHERS))
@pytest.mark.parametrize(("name", "number"), ALL, ids=str)
def test_on_other_pipelines(bench: str, name: str, number: int) -> None:
    checked(bench, name, number, OTHERS[bench])


# Each check fails for an intervention that is made to fail it ----------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Broken(interp.Intervention):
    """Noise on a site, done wrong in one way."""

    how: str = ""

    name: ClassVar[str] = "broken"
    calls: ClassVar[list[int]] = []

    def claims(self):
        return frozenset({3} if self.how == "claims" else set())

    def branches(self):
        return ("cond",) if self.how == "branches" else None

    def attach(self, hooks, batch):
        steps = self.steps(batch.timeline)
        module = hooks.family_module("unet.mid_block")
        if self.how == "hook":
            module.register_forward_hook(lambda m, a, out: None)
        if self.how == "weights":
            with torch.no_grad():
                next(module.parameters()).add_(1)
        if self.how == "swallows":
            hooks.write("unet:out", lambda x, at: self.attach_nothing())

        def write(x, at):
            self.calls.append(1)
            if self.how == "no effect":
                return x
            if at.step in steps or self.how == "window":
                add = len(self.calls) if self.how == "random" else len(x) if self.how == "batch" else 1.0
                return x + add
            return None

        hooks.write("unet.mid_block:out", write)

    def attach_nothing(self):
        return None


WRONG = [
    ("spec", "name the class in pyproject", "spec"),
    ("claims", "claims are", "claims"),
    ("branches", "must claim 'branches'", "claims"),
    ("window", "which is to change nothing", "identity"),
    ("window", "changes an earlier one", "window"),
    ("window", "changes an earlier one", "window with Heun"),
    ("no effect", "changes nothing", "has an effect"),
    ("random", "the same again differs", "same again"),
    ("hook", "left", "nothing is left"),
    ("hook", "left", "nothing is left after an exception"),
    ("batch", "a batch of two differs", "batch of two"),
    ("branches", "where branches\\(\\) says", "forward passes"),
]


@pytest.mark.parametrize(("how", "said", "name"), WRONG)
def test_a_wrong_intervention_is_told(how, said, name):
    pipe = tiny.__wrapped__("sd1") if how == "hook" else tiny("sd1")  # the hook stays
    (check,) = check_intervention(Broken(how=how), pipe, only=[name], size=(16, 16))
    with pytest.raises(AssertionError, match=said):
        check()


def test_weights_that_stay_changed_are_told():
    pipe = tiny.__wrapped__("sd1")
    (check,) = check_intervention(Broken(how="weights"), pipe, only=["nothing is left"], size=(16, 16))
    with pytest.raises(AssertionError, match="other pictures"):
        check()


def test_a_check_that_is_not_there():
    with pytest.raises(interp.InterpError, match="did you mean 'claims'"):
        list(check_intervention(interp.RemoveText(), tiny("sd1"), only=["claim"]))

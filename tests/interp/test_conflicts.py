"""Two owners of one thing are refused, whatever names they use for it; so is what would do nothing beside the others."""

import warnings

import numpy as np
import pytest

import interp
from interp.interventions import from_spec
from tests.interp.reference import tiny

A, B = "a red circle", "a red dog on the blue square"
MID, CROSS = "unet.mid_block:out", "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
EMBEDDED = "text_encoder.embeddings:out"
LEFT, RIGHT = np.eye(2)[[0, 0]], np.eye(2)[[1, 1]]
UNIT = {"unit": "step"}


def planned(*changes, name="sd1", scale=4.0, prompts=(A, B), **more):
    return interp.plan(
        tiny(name), list(prompts), steps=4, guidance_scale=scale, capture=interp.Capture(attention=None, image=False),
        interventions=changes, **more,
    )  # fmt: skip


def refused(match, *changes, **more):
    with pytest.raises(interp.InterpError, match=match) as error:
        planned(*changes, **more)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600  # a mask or a vector is told by its shape, not by its numbers


OWNED_TWICE = {
    "a glob and a name": (interp.Ablate("*mid_block:out"), interp.Ablate(MID, "mean")),
    "a glob of layers": (interp.ReplacePrompt(A, layers="*mid*"), interp.ReplacePrompt(B, layers="*attn2", side="v")),
    "a kind and a name": (interp.AblateHeads("cross", heads=(0, 1)), interp.AblateHeads(CROSS, "mean", heads=(1,))),
    "both and one": (interp.SetAttention(roles="eos", branch="both"), interp.SetAttention(roles="eos", value=0.1)),
    "a role and a word": (interp.SetAttention("red"), interp.SetAttention(roles="word", value=0.1)),
    "a role and a word of keys": (
        interp.Ablate(f"{CROSS}.to_k:out", tokens=("red",)), interp.Ablate(f"{CROSS}.to_k:out", tokens=("word",)),
    ),
    "regions that overlap": (interp.Ablate(MID, region=(0, 0, 1, 0.6)), interp.Ablate(MID, region=(0, 0.5, 1, 1))),
    "channels in common": (interp.Ablate(MID, channels=(0, 1)), interp.Ablate(MID, channels=(1, 2))),
    "a mask and a region": (interp.Ablate(MID, mask=LEFT), interp.Ablate(MID, region=(0, 0.5, 1, 1))),
    "masks that overlap": (interp.Ablate(MID, mask=LEFT), interp.Ablate(MID, mask=LEFT + RIGHT)),
    "layers that are cached": (interp.CacheCrossAttention(layers="*mid*"), interp.SetAttention(roles="pad")),
}  # fmt: skip
OWNED_ONCE = {
    "other layers": (
        interp.ReplacePrompt(A, layers="*down*"), interp.ReplacePrompt(B, layers=("*mid*", "re:.*up_blocks.*")),
    ),
    "other heads": (interp.AblateHeads("cross", heads=(0,)), interp.AblateHeads("cross", "mean", heads=(1,))),
    "other parts of the picture": (interp.Ablate(MID, mask=LEFT), interp.Ablate(MID, "mean", mask=RIGHT)),
    "regions beside each other": (
        interp.Ablate(MID, region=(0, 0, 1, 0.5)), interp.Ablate(MID, region=(0, 0.5, 1, 1)),
    ),
    "keys and values": (interp.ReplacePrompt(A, side="k"), interp.ReplacePrompt(B, side="v")),
    "other sites": (interp.Ablate("*mid_block:out"), interp.Ablate("*up_blocks.0:out")),
    "other layers than the cached": (interp.CacheCrossAttention(layers="*mid*"), interp.SetAttention("red", layers="*up*")),
}  # fmt: skip


@pytest.mark.parametrize("pair", OWNED_TWICE.values(), ids=OWNED_TWICE)
def test_two_owners_are_refused(pair):
    for one, other in (pair, pair[::-1]):
        refused("both decide about '.*' in steps 0–3; give them windows that do not overlap", one, other)


@pytest.mark.parametrize("pair", OWNED_ONCE.values(), ids=OWNED_ONCE)
def test_owners_of_different_things_go_together(pair):
    assert len(planned(*pair)) == 2


NOTHING = {
    "guidance is off": ([interp.Ablate(MID, branch="uncond")], {"scale": 1.0}, "a run without guidance does not evaluate"),
    "the text is not read": (
        [interp.ReplacePrompt(B, start=0.5), interp.RemoveText(start=0.5)], {},
        r"changes the branch 'cond', which RemoveText\(start=0.5\) leaves out in steps 2–3",
    ),
    "no guidance": ([interp.RemoveGuidance(), interp.SetAttention(roles="pad", branch="uncond")], {}, "out in steps 0–3"),
    "guided elsewhere": (
        [interp.GuidanceInterval(start=0.5, unit="fraction"), interp.Steer(MID, [1.0] * 32, branch="uncond", stop=0.5)], {},
        "leaves out in steps 0–1",
    ),
    "what reads the text is frozen": (
        [interp.ReplaceEOS(B, start=0.75), interp.CacheCrossAttention(start=0.5)], {}, "reuses what cross-attention gave",
    ),
    "the encoder runs apart": (
        [interp.AddNoise(EMBEDDED, scale=3.0), interp.EncoderLayer(1)], {}, "both decide about what a text encoder computes",
    ),
    "no position is left": ([interp.ReplaceEOS(B, skip=80)], {}, "leaves no position of any prompt"),
    "one of two globs": ([interp.ReplacePrompt(B, layers=("*mid*", "*upp*"))], {}, "no cross-attention layer by '\\*upp\\*'"),
    "no negative words": ([interp.SetAttention(roles="word", branch="both")], {}, "the uncond branch's prompt '' has no token"),
    "a mask of nothing": ([interp.Ablate(MID, mask=np.eye(64))], {}, "no cell of 'unet.mid_block:out'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "more", "match"), NOTHING.values(), ids=NOTHING)
def test_what_would_change_nothing_is_refused(changes, more, match):
    for order in (changes, changes[::-1]):
        refused(match, *order, **more)


def test_what_changes_something_is_not():
    """Half of a window, the other branch, a pooled vector, another encoder."""
    for changes, more in (
        ([interp.ReplacePrompt(B, start=0.25), interp.RemoveText(start=0.5)], {}),
        ([interp.ReplacePrompt(B, start=0.25), interp.CacheCrossAttention(start=0.5)], {}),
        ([interp.Ablate(MID, branch="both", start=0.5), interp.RemoveText(start=0.5)], {}),
        ([interp.ReplacePrompt(B, start=0.75), interp.CacheCrossAttention(start=0.5)], {"name": "sdxl"}),
        ([interp.AddNoise(EMBEDDED), interp.EncoderLayer(1, encoders=["text_encoder_2"])], {"name": "sdxl"}),
    ):
        planned(*changes, **more)


def test_a_prompt_that_no_encoder_reads():
    """Stable Diffusion XL takes zeros for an empty negative prompt."""

    def run(**more):
        return interp.trace(
            tiny("sdxl"), A, steps=1, guidance_scale=4.0, height=16, width=16, progress=False,
            interventions=[interp.Ablate(EMBEDDED, branch="uncond")], **more,
        )  # fmt: skip

    with pytest.raises(interp.InterpError, match=r"read no prompt of the branch 'uncond'.* give a negative prompt"):
        run()
    assert len(run(negative_prompt="a cat")) == 1


def test_a_window_between_two_steps_is_told():
    with pytest.warns(UserWarning, match=r"none of the run's 4 steps lies in the window of RemoveText\(start=0.8\)"):
        planned(interp.RemoveText(start=0.8))
    for window in ({"start": 4}, {"start": 2.5, "stop": 2.6}, {"stop": 0}):
        with pytest.warns(UserWarning, match="4 steps, which are numbered from 0 to 3, lies in .* changes nothing"):
            planned(interp.RemoveText(**window, **UNIT))
    with warnings.catch_warnings(action="error"):
        for window in (
            {"start": 1.0},
            {"stop": 0.0},
            {"start": 4, "stop": 4, **UNIT},
            {"start": 0.3, "stop": 0.3},
            {"start": 0.75},
        ):
            planned(interp.RemoveText(**window))


def test_lists_are_as_good_as_tuples():
    """As a user writes them, and as YAML gives them."""
    for change in (
        interp.ReplaceTokens(roles=["eos", "pad"], layers=["*mid*"]),
        interp.EncoderLayer(1, encoders=["text_encoder"]),
        interp.SetAttention(roles=["pad"], heads=[0], layers=["*mid*"]),
        interp.CacheCrossAttention(layers=["*mid*"]),
        interp.Ablate(MID, channels=[0, 1], region=[0, 0, 1, 0.5], mask=[[0, 1], [1, 1]]),
        interp.GuidanceScale([1.0, 3.0]),
    ):
        assert from_spec(change.spec()) == change and hash(from_spec(change.spec())) == hash(change)

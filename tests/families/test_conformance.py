"""Every family passes the suite that is shipped for authors, and the tables of docs/families.md say what came of it."""

from functools import cache

import pytest
import torch

from interp.testing import check_family
from interp.testing.checks import SCHEDULERS
from interp.testing.ways import WAYS
from tests.families import variant_pipelines as variants
from tests.families.fused import fused_attention
from tests.families.pipelines import BUILDERS, dit

SHORT = {"max_sequence_length": 24}
THREE_LAYERS = {"max_sequence_length": 40, "text_encoder_out_layers": [1, 2, 3]}
NO_BINS = {**SHORT, "use_resolution_binning": False}
INSTRUCTION = ["photo of the square:", "the cat on a background: "]

FAMILIES = {
    "sd1": {"size": (16, 24)},
    "sd2": {"size": (16, 24)},
    "sdxl": {"size": (24, 16)},
    "pixart_alpha": {"options": NO_BINS},
    "pixart_sigma": {"options": NO_BINS},
    "sd3": {"options": SHORT},
    "sd35": {"options": SHORT},
    "flux": {"options": SHORT, "guided": {"true_cfg_scale": 3.0}, "unguided": {"guidance_scale": 3.5}},
    "flux_schnell": {"options": SHORT, "guided": None, "unguided": {}},
    "flux2": {"options": THREE_LAYERS, "guided": None, "unguided": {}, "reference": fused_attention},
    "flux2_klein": {"options": THREE_LAYERS, "reference": fused_attention},
    "qwenimage": {
        "options": {"max_sequence_length": 40},
        "guided": {"true_cfg_scale": 4.0},
        "unguided": {"true_cfg_scale": 1.0},
    },
    "zimage": {"options": {"cfg_normalization": 1.0, "max_sequence_length": 64}, "unguided": {"guidance_scale": 0.0}},
    "sana": {"options": {**NO_BINS, "complex_human_instruction": INSTRUCTION}, "size": (32, 64)},
    "hunyuandit": {"options": {"use_resolution_binning": False}, "size": (64, 96)},
    "auraflow": {"options": SHORT},
    "cogview4": {"options": SHORT},
}

SIZE = (16, 24)
SMALL, LARGE = variants.pictures(*SIZE), variants.pictures(32, 48)
STARTED = {"size": SIZE, "steps": 4, "options": {"strength": 0.7, "height": None, "width": None}}
EMBEDDING = [torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(5))]
VARIANTS = {
    "controlnet": (variants.controlled, {"size": SIZE, "for_each": {"image": SMALL[:2]}}),
    "ip_adapter": (variants.with_ip_adapter, {"size": SIZE, "options": {"ip_adapter_image_embeds": EMBEDDING}}),
    "lora": (variants.with_lora, {"size": SIZE}),
    "img2img": (variants.image_to_image, {**STARTED, "for_each": {"image": SMALL[:2]}}),
    "img2img_xl": (variants.image_to_image_xl, {**STARTED, "for_each": {"image": SMALL[:2]}}),
    "inpaint": (
        variants.inpainting,
        {"size": SIZE, "for_each": {"image": SMALL[:2], "mask_image": [p.convert("L") for p in SMALL[2:]]}},
    ),
    "flux_img2img": (
        variants.flux_image_to_image,
        {"options": {**SHORT, "image": LARGE[0], "strength": 0.7}, "guided": {"true_cfg_scale": 3.0}, "unguided": {},
         "steps": 4},
    ),
    "flux_control": (
        variants.flux_control, {"options": {**SHORT, "control_image": LARGE[0]}, "guided": None, "unguided": {}},
    ),
}  # fmt: skip
MODELS = {**{name: (BUILDERS.get(name, dit.cogview4), given) for name, given in FAMILIES.items()}, **VARIANTS}

LEFT_OUT = {
    # the pipeline mixes up its masks, which test_chat_families.py looks at
    ("qwenimage", "images per prompt"),
    # an embedding for each of two samples
    ("ip_adapter", "images per prompt"), ("ip_adapter", "batch of two"),
    # makes its own latents
    ("img2img", "layout"), ("img2img_xl", "layout"), ("inpaint", "layout"), ("flux_img2img", "layout"),
    # encodes one picture for the batch with the first generator
    ("flux_img2img", "batch of two"),
}  # fmt: skip


PLANNED = {"sd1", "pixart_alpha", "sd3", "flux", "qwenimage", "zimage"}
"""Of which costs are counted, which takes seconds: a UNet, masked cross-attention, joint attention with guidance as rows and
as calls, text as long as it is, and a list of pictures."""


def checks(name):
    """What is checked of a model; ways of running it are those of its family."""
    make, given = MODELS[name]
    return {
        str(check): check
        for check in check_family(make, **{"steps": 2, **given})
        if (name, str(check)) not in LEFT_OUT
        and not (name in VARIANTS and (str(check) in WAYS or str(check).startswith("steps with")))
        and not (name not in PLANNED and str(check) == "costs")
    }


CHECKS = {name: checks(name) for name in MODELS}
TRIED = [*SCHEDULERS, *WAYS]


@cache
def outcome(name, check):
    """What came of a check."""
    return CHECKS[name][check]()


CASES = [(name, check) for name, found in CHECKS.items() for check in found]


@pytest.mark.parametrize(("name", "check"), CASES, ids=[f"{name}: {check}" for name, check in CASES])
def test_conformance(name, check):
    came = outcome(name, check)
    assert (came is not None) == (check in TRIED)
    # to be refused is for what leaves attention out; whatever else is offered gives the same numbers
    if came is not None and came.startswith("refused"):
        assert "Cache" in check or "cache" in check or "broadcast" in check, came


def test_the_tables_of_the_docs():
    from tests.families.support_table import PAGE, with_tables

    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run `python -m tests.families.support_table`"

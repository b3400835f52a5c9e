"""Every family passes the suite that is shipped for authors of families."""

from functools import partial

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from interp.testing import check_family
from tests.families.pipelines import BUILDERS

DIFFUSION = {
    cls.__name__: partial(lambda cls, own: cls.from_config(own.config), cls)
    for cls in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler)
}
FLOW_HEUN = {"FlowMatchHeun": lambda own: FlowMatchHeunDiscreteScheduler(shift=3.0)}
SHORT = {"max_sequence_length": 24}
NO_BINS = {**SHORT, "use_resolution_binning": False}

FAMILIES = {
    "sd1": {"size": (16, 24), "schedulers": DIFFUSION},
    "sd2": {"size": (16, 24)},
    "sdxl": {"size": (24, 16)},
    "pixart_alpha": {"options": NO_BINS, "schedulers": DIFFUSION},
    "pixart_sigma": {"options": NO_BINS},
    "sd3": {"options": SHORT, "schedulers": FLOW_HEUN},
    "sd35": {"options": SHORT},
    "flux": {"options": SHORT, "guided": {"true_cfg_scale": 3.0}, "unguided": {"guidance_scale": 3.5}},
    "flux_schnell": {"options": SHORT, "guided": None, "unguided": {}},
}


def cases():
    for name, settings in FAMILIES.items():
        for check in check_family(BUILDERS[name], **settings):
            yield pytest.param(check, id=f"{name}: {check}")


@pytest.mark.parametrize("check", list(cases()))
def test_conformance(check):
    check()

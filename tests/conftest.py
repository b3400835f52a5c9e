"""Shared by all tests: one thread, no network, no chatter."""

import contextlib
import gc
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # notices about torchvision, which nothing here needs
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # not by importing it, which the process that hands out need not

MEMORY = Path("/dev/shm")
"""Tests make tens of thousands of small files: a disk takes its time to delete them."""
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ["TMPDIR"] = str(MEMORY)
    tempfile.tempdir = None  # pytest has asked for the folder before

LONGEST = (
    "families/test_conformance.py", "interp/test_check_intervention.py", "reproduction/test_reproduction.py",
    "docs/test_pages.py", "jobs/test_faults.py", "jobs/test_jobs.py", "test_examples.py", "probes/test_check_probe.py",
    "interp/test_interventions.py", "interp/test_forecast.py", "interp/test_policy.py", "test_demo.py",
    "interp/test_activations.py", "interp/test_attention_changes.py", "scenes/test_weights.py", "interp/test_envoy.py",
    "scenes/test_attribution.py", "stores/test_reader.py", "jobs/test_cluster.py", "interp/test_policy_formulas.py",
    "interp/test_untouched.py", "docs/test_readme.py", "interp/test_trace.py", "families/test_text_changes.py",
    "interp/test_hooks.py", "interp/test_costs.py", "interp/test_probabilities.py", "interp/test_hook_probs.py",
    "reproduction/test_pages.py", "interp/test_sites.py", "interp/test_text_states.py", "test_cli.py",
    "stores/test_resume.py", "scenes/test_train.py", "probes/test_page.py", "stores/test_verify.py", "test_layers.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Let the files that take longest be the first that are handed out: what comes last, one worker does alone."""
    here, last = Path(__file__).parent, len(LONGEST)
    rank = {here / name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, last))


def pytest_collection_finish():
    """What the imports made stays: the garbage collector need not look at millions of objects again in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def a_quarter_as_wide(tmp_path_factory):
    """Let the bundled model draw 32 × 32 pixels where nothing else is asked for, and load it once.

    Its passes take most of a test's time.
    """
    from interp.scenes import folder

    weights = "diffusion_pytorch_model.safetensors"
    with _bundled(tmp_path_factory.mktemp("quarter")) as (unet, config):
        (unet / "config.json").write_text(json.dumps(config))
        (unet / weights).symlink_to(folder() / "unet" / weights)
        yield


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """The same, with an untrained UNet of a quarter of the channels: where no picture matters, but what is done with them."""
    import torch
    from diffusers import UNet2DConditionModel

    with _bundled(tmp_path_factory.mktemp("thin")) as (unet, config):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            channels = [n // 4 for n in config["block_out_channels"]]
            made = UNet2DConditionModel.from_config({**config, "block_out_channels": channels, "norm_num_groups": 4})
        for name, weight in made.named_parameters():
            if ".attn2.to_" in name and weight.ndim == 2:
                weight.data *= 4  # or the text would hardly be seen
        made.save_pretrained(unet)
        yield


@contextlib.contextmanager
def _bundled(folder):
    """Let the bundled model have the UNet that will be put into a folder; yield that and the configuration of a narrow one."""
    from interp import loading, scenes

    made, real = folder / "scenes", loading._locate
    (made / "unet").mkdir(parents=True)
    for part in scenes.folder().iterdir():
        if part.name != "unet":
            (made / part.name).symlink_to(part)
    config = json.loads((scenes.folder() / "unet" / "config.json").read_text())
    with pytest.MonkeyPatch.context() as patch, loading.loaded_once():
        patch.setattr(loading, "_locate", lambda name: str(made) if name == loading.BUNDLED else real(name))
        yield made / "unet", {**config, "sample_size": config["sample_size"] // 4}


@pytest.fixture(scope="module")
def memory_untold():
    """What a printed plan says of memory takes a call without data each time; tests/interp/test_forecast.py looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.planning.peak_memory", lambda *_, **__: 0)
        yield

"""What ships: loads without interp, draws what is asked, and is scored by judges that know right from wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest

from interp.errors import InterpError
from interp.scenes import agreement, alignment, captions, draw, folder, judge
from interp.scenes.grammar import matched, parse

LOAD = """
import sys
sys.modules["interp"] = None  # importing it would fail
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe.tokenizer).__name__ == "CLIPTokenizer" and pipe.safety_checker is None
assert len(pipe.tokenizer.tokenize("checkered")) > 1
pipe.set_progress_bar_config(disable=True)
image = pipe("a red circle on a navy background", num_inference_steps=1, output_type="np").images
assert image.shape == (1, 128, 128, 3)
"""


def test_pipeline_needs_nothing_of_interp():
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder())], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "not used" not in done.stderr and "newly initialized" not in done.stderr


def test_size_of_what_ships():
    files = [p for p in folder().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40_000_000
    assert not [p for p in files if p.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


def test_judge_and_alignment_on_renders():
    drawn = draw(40, seed=11, full=True)
    seen = judge(drawn.images)
    answers = [
        right for scene, verdict in zip(drawn.scenes, seen, strict=True) for right in matched(scene, verdict).values()
    ]
    assert np.mean(answers) >= 0.95
    places = [
        abs(a.x - b.x) + abs(a.y - b.y)
        for scene, verdict in zip(drawn.scenes, seen, strict=True)
        if len(scene.objects) == len(verdict.objects) == 1
        for a, b in zip(scene.objects, verdict.objects, strict=True)
    ]
    assert np.mean(places) < 0.06
    assert all(0 < p <= 1 for verdict in seen for p in verdict.confidence)
    rng = captions.random_for(0)
    wrong = [captions.caption(captions.altered(scene, rng), rng) for scene in drawn.scenes]
    better = alignment(drawn.images, drawn.captions) > alignment(drawn.images, wrong)
    assert better.mean() >= 0.9
    assert agreement(drawn.images, drawn.captions).mean() >= 0.95
    assert agreement(drawn.images, wrong).mean() < agreement(drawn.images, drawn.captions).mean()


def test_generated_pictures_show_what_was_asked():
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder())
    pipe.set_progress_bar_config(disable=True)
    asked = captions.prompts(4, 1, seed=5)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(asked))]
    images = pipe(asked, num_inference_steps=6, guidance_scale=4.0, generator=seeds).images
    right = [
        ok
        for p, v in zip(asked, judge(images), strict=True)
        for (_, n), ok in matched(parse(p), v).items()
        if n in ("shape", "color")
    ]
    assert np.mean(right) >= 0.75


def test_errors_say_what_to_do():
    images = draw(2, seed=1).images
    with pytest.raises(InterpError, match="give a list of 2 prompts"):
        alignment(images, ["a red circle"])
    with pytest.raises(InterpError, match="convert them first"):
        judge(images.astype(np.float32))
    with pytest.raises(InterpError, match="names nothing"):
        agreement(images[:1], ["nothing at all"])


def test_card_is_of_these_weights():
    from pathlib import Path

    from interp.scenes.card import with_tables
    from interp.scenes.marked import MARK
    from interp.scenes.pack import hashes
    from interp.scenes.quality import MEASURES

    card = (folder() / "README.md").read_text()
    for size, digest in hashes(folder()).values():
        assert digest in card and f"{size:,}" in card
    marks = MARK.findall(card)
    assert set(marks) == {
        "settings",
        *(title for title, _ in MEASURES.values()),
    }  # the card has a place for every measure
    measured = folder() / "quality.json"
    assert not measured.exists() or card == with_tables(card, json.loads(measured.read_text()))
    page = Path(__file__).parents[2] / "docs" / "scenes.md"
    assert not page.exists() or page.read_text() == card

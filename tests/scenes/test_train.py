"""The training program: every phase at its smallest, resumed, packed, and loaded as a pipeline."""

import json

import pytest
import torch
from safetensors import safe_open

from interp.scenes import folder, train
from interp.scenes.parts import FULL
from interp.scenes.train_loop import Plan, rate


def _steps(folder, phase):
    with safe_open(folder / f"{phase}.checkpoint.safetensors", "pt") as file:
        return int(file.metadata()["step"]), file.get_tensor(next(k for k in sorted(file.keys()) if k[:6] == "weight"))


def test_smoke_resumes(tmp_path):
    base = ["--smoke", "--out", str(tmp_path), "--device", "cpu"]
    train.main([*base, "--steps", "2"])
    first = {phase: _steps(tmp_path, phase) for phase in train.PHASES}
    assert all(step == 2 for step, _ in first.values())
    train.main([*base, "--steps", "3"])
    for phase, (_, before) in first.items():
        step, after = _steps(tmp_path, phase)
        assert step == 3 and not torch.equal(before, after), phase
    index = json.loads((tmp_path / "weights" / "model_index.json").read_text())
    assert index["requires_safety_checker"] is False

    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "weights")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    clip = CLIPModel.from_pretrained(tmp_path / "weights" / "clip")
    shared = pipe.text_encoder.state_dict()
    for name, value in clip.text_model.state_dict().items():
        assert torch.equal(value, shared[name if name in shared else f"text_model.{name}"])


def test_the_recipe_is_that_of_the_card():
    card = (folder() / "README.md").read_text()
    for phase, recipe in train.RECIPE.items():
        rows = [line for line in card.splitlines() if line.startswith((f"| `{phase}`", f"| `{phase} "))]
        assert f"| {recipe['steps']:,} × {recipe['batch']:,} |" in rows[0]
    layers = json.loads((folder() / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    assert FULL.text_layers == layers


def test_an_unknown_phase_is_refused():
    with pytest.raises(SystemExit, match="no phase vea"):
        train.main(["vea", "--device", "cpu"])


def test_schedule_ends_by_seconds_or_steps(tmp_path):
    plan = Plan("x", tmp_path, steps=1000, batch=1, rate=1.0, cooldown=0.5, budget=100)
    assert rate(400, 10, plan) == 1.0
    assert rate(400, 75, plan) == pytest.approx(0.5)
    assert rate(1000, 0, plan) == 0.0


def test_a_variant_is_trained_measured_and_goes_on(tmp_path):
    from interp.scenes import variants

    base = ["words", "--out", str(tmp_path), "--smoke", "--device", "cpu", "--alone", "words"]
    asked = variants.arguments().parse_args(base)
    variants._share_parts(tmp_path, True, "cpu")
    variants.main(base)
    first = json.loads((tmp_path / "words" / "result.json").read_text())
    assert first["clip"]["steps"] == first["unet"]["steps"] == 2 and first["n"] == 2
    for condition in ("whole", "words of A, EOS of B", "words only", "EOS only"):
        with_a, with_b, gap = (first[condition][k]["value"] for k in ("with A", "with B", "B − A"))
        assert 0 <= with_a <= 1 and gap == pytest.approx(with_b - with_a, abs=1e-3)
    variants.one("words", asked)  # what is trained is not trained again
    assert json.loads((tmp_path / "words" / "result.json").read_text()) == first
    with pytest.raises(SystemExit, match="no variant deep"):
        variants.main(["deep", "--device", "cpu"])
    file, page = tmp_path / "docs.json", tmp_path / "page.md"  # what others found stays, and all of it is in the page
    file.write_text(json.dumps({"variants": {"wide": {**first, "text": "wider"}}}))
    (tmp_path / "new.json").write_text(json.dumps({"variants": {"words": first}}))
    page.write_text("<!-- measured: variants -->\n<!-- end -->\n")
    variants.main(["--merge", str(tmp_path / "new.json"), "--json", str(file), "--page", str(page)])
    assert json.loads(file.read_text())["variants"] == {"words": first, "wide": {**first, "text": "wider"}}
    value = first["whole"]["with A"]["value"]
    assert page.read_text().count(f"| {value:.3f} [") >= 2 and "| wide: wider | 2 |" in page.read_text()

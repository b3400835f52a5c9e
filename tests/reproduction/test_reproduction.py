"""The whole reproduction, tiny: all experiments on scenes, two pairs, four steps, small pictures.

What the pictures show at this size means nothing; that the numbers are those of the stores is what is tested.
"""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import xarray as xr
from diffusers import DiffusionPipeline

from interp import InterpError
from interp.reproduction import Settings, reproduce
from interp.reproduction.experiment import judges
from interp.reproduction.measures import Check, Estimate, verdict
from interp.reproduction.runs import Recipe, metrics_of
from interp.stores import open_run, synthetic_run
from tests.test_cli import interp

pytestmark = pytest.mark.usefixtures("thin", "memory_untold")

TINY = {
    "pairs": 2,
    "steps": 4,
    "attention_prompts": 4,
    "trajectory_prompts": 2,
    "shares": (0.25, 0.5),
    "size": (32, 32),
}


@pytest.fixture(scope="module")
def folder(thin: None, memory_untold: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reproduction that began with one experiment and then grew to all."""
    out = tmp_path_factory.mktemp("reproduction") / "out"
    said = reproduce(out, Settings(**TINY, resamples=200), only=["E4"], progress=False)
    assert said.startswith("E4 ") and not (out / "removal.zarr").exists()
    with mock.patch("diffusers.DiffusionPipeline.from_pretrained", wraps=DiffusionPipeline.from_pretrained) as loaded:
        said = reproduce(out, Settings(**TINY, resamples=200), progress=False)
    assert loaded.call_count == 1  # for five runs, one of them with another scheduler
    assert [line.split()[0] for line in said.splitlines()][:14] == [f"E{k}" for k in range(1, 15)]
    return out


@pytest.fixture(scope="module")
def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "numbers.json").read_text())


def row(numbers: dict[str, Any], key: str, first: Any, table: int = 0) -> dict[str, Any]:
    """A row of an experiment's table, by its first cell, as column → value."""
    found = numbers[key]["tables"][table]
    return dict(zip(found["columns"], next(r for r in found["rows"] if r[0] == first), strict=True))


def test_alignment_under_exchanged_eos_is_the_stores(folder: Path, numbers: dict[str, Any]) -> None:
    tree = xr.open_datatree(folder / "exchange.zarr", engine="zarr")
    mine = (tree["condition"] == "EOS of B").values
    scores = tree["scores/score"].isel(sample=mine)
    found = row(numbers, "E4", "attribute judge")
    assert found["source A (words)"]["value"] == pytest.approx(float(scores.sel(metric="judge:prompt").mean()))
    assert found["target B (EOS)"]["value"] == pytest.approx(float(scores.sel(metric="judge:target").mean()))
    assert found["B − A"]["n"] == len(np.unique(tree["pair"].values[mine])) == 2


def test_passes_saved_and_distance_are_the_stores(folder: Path, numbers: dict[str, Any]) -> None:
    tree = xr.open_datatree(folder / "removal.zarr", engine="zarr")
    pictures, condition = tree["images/image"].astype(float), tree["condition"].values
    late, base = (np.flatnonzero(condition == c) for c in ("no text in the last 2 steps", "baseline"))
    assert tree["prompt_id"].values[late].tolist() == tree["prompt_id"].values[base].tolist()
    found = row(numbers, "E8", 2) | row(numbers, "E8", 2, table=1)
    l1 = np.abs(pictures.values[late] - pictures.values[base]).mean() / 255
    assert found["L1"]["value"] == pytest.approx(l1, rel=1e-6) and l1 > 0
    passes = tree["trajectory/nfe"].sum("branch").values
    assert (
        found["passes saved"] == pytest.approx(1 - passes[late].sum() / passes[base].sum()) == found["a/(2T)"] == 0.25
    )
    attrs = tree["scores"].attrs
    seconds = [attrs["seconds_per_sample"][str(b)] for b in np.unique(tree["batch"].values[late])]
    assert found["seconds a picture"]["value"] == pytest.approx(np.mean(seconds)) and min(seconds) > 0
    distance = attrs["by_condition"]["clip_fid:baseline"]["no text in the last 2 steps"]
    assert found["FID to a = 0, CLIP"] == pytest.approx(distance["value"]) and distance["samples"] == len(late) == 2


def test_attention_to_bos_is_the_stores(folder: Path, numbers: dict[str, Any]) -> None:
    tree = xr.open_datatree(folder / "attention.zarr", engine="zarr")
    base, layers = (tree["condition"] == "baseline").values, []
    for grid in tree["attention"].children.values():
        bos = grid["probs"].isel(sample=base, token=0).sel(branch="cond")
        assert set(grid["token_role"].values[base][:, 0].tolist()) == {"bos"}
        layers += bos.astype(float).mean(["sample", "step", "head", "query_y", "query_x"]).values.tolist()
    assert row(numbers, "E3", "[SOS]")["a token"]["value"] == pytest.approx(np.mean(layers), rel=1e-3)


def test_guidance_is_the_stores(folder: Path, numbers: dict[str, Any]) -> None:
    trajectory = xr.open_datatree(folder / "trajectory.zarr", engine="zarr")["trajectory"]
    gap = trajectory["noise_pred"].sel(branch="cond") - trajectory["noise_pred"].sel(branch="uncond")
    norm = trajectory["guidance_scale"] * np.sqrt((gap.astype(float) ** 2).mean(["channel", "y", "x"]))
    assert row(numbers, "E7", 4)["guidance"]["value"] == pytest.approx(float(norm.isel(step=0).mean()), rel=1e-5)


def test_verdicts_follow_the_printed_rule(folder: Path, numbers: dict[str, Any]) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    nan = float("nan")
    for key, found in numbers.items():
        checks = []
        for c in found["checks"]:
            number = Estimate(*(nan if c[k] is None else c[k] for k in ("value", "low", "high")), c["n"])
            side, bound = c["rule"].split()
            checks.append(Check("", number, side, float(bound.replace("−", "-")), c["decides"]))
            assert checks[-1].state == c["state"], (key, c)
        assert verdict(checks) == found["verdict"]
        section = page.split(f'<section id="{key}">')[1].split("</section>")[0]
        assert found["verdict"] in section and "out of reach" not in section
    assert "out of reach" in page.split('<section id="E14">')[1]
    judged = [c for c in numbers["E4"]["checks"] if c["decides"]]
    assert len(judged) == 1 and "judge" in judged[0]["claim"]  # CLIP pools at EOS: it does not decide


def test_the_page_needs_nothing_from_outside(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    links = set(re.findall(r'(?:src|href)="([^"]*)"', page))
    outside = {one for one in links if not one.startswith(("data:", "#"))}
    runs = ("exchange", "removal", "fewer_steps", "attention", "trajectory")
    assert outside == {f"{name}.zarr/" for name in runs} | {f"trimmed/{name}.zarr.zip" for name in runs}
    assert all((folder / one).exists() for one in outside)
    assert not re.search(r"<script|<link|@import|url\(http", page)
    assert page.count("<svg") >= 10 and page.count("<section") == 15
    for claim in ("This is a trial of 2 pairs", "Section 5.1, Table 1", "left open", "95 %"):
        assert claim in page


def test_a_trimmed_run_has_the_numbers_without_the_pictures(folder: Path) -> None:
    whole, small = open_run(folder / "exchange.zarr"), open_run(folder / "trimmed" / "exchange.zarr.zip")
    assert (folder / "trimmed" / "exchange.zarr.zip").stat().st_size < 200_000 and "images" not in small.tree.children
    assert small.samples.equals(whole.samples) and small.nfe.equals(whole.nfe)
    both = [run.probe("eos_replacement", swap="EOS of B", resamples=10)["alignment"] for run in (whole, small)]
    assert both[0].equals(both[1])


def files(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*.zarr/**/c/*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.stat().st_mtime_ns


def test_the_same_command_again_makes_nothing_new(folder: Path, numbers: dict[str, Any]) -> None:
    before = dict(files(folder))
    said = reproduce(folder, Settings(**TINY, resamples=200), only=["E8", "E14"], progress=False)
    assert said.splitlines()[1].startswith("E14  out of reach")
    assert dict(files(folder)) == before
    again = json.loads((folder / "numbers.json").read_text())
    assert again == {"E8": numbers["E8"]}


def test_what_cannot_be_mixed_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="steps=4, and 8 was asked for"):
        reproduce(folder, Settings(**{**TINY, "steps": 8}), progress=False)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InterpError, match="holds something else"):
        reproduce(tmp_path, Settings(**TINY), progress=False)
    done = interp("reproduce", "--only", "E4,E88", "--out", str(tmp_path / "new"))
    assert done.returncode == 2 and "no experiment 'E88'" in done.stderr and not (tmp_path / "new").exists()
    out = tmp_path / "again"
    done = interp("reproduce", "--model", "scens", "--only", "E7", "--out", str(out))
    assert done.returncode == 2 and "did you mean 'scenes'" in done.stderr
    Settings(**TINY).keep(out)  # nothing was made there under the wrong name: the right one may follow
    done = interp("reproduce", "--model", "scens", "--clip-model", "no/where", "--out", str(tmp_path / "new"))
    assert done.returncode == 2 and "cannot load the CLIP model 'no/where'" in done.stderr
    assert not (tmp_path / "new").exists()
    done = interp("reproduce", "--pairs", "1", "--out", str(tmp_path / "new"))
    assert done.returncode == 2 and "pairs=1" in done.stderr


def test_another_model_and_files_of_prompts(tmp_path: Path) -> None:
    """A folder as model and T2I-CompBench's files, by the command line; experiments that need no scores."""
    from interp.scenes import folder as weights

    for name, text in {"color": "a red cup and a blue dog", "texture": "a wooden cup and a metallic dog"}.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{text}{i}\n" for i in range(3)))
    (tmp_path / "complex.txt").write_text("The red cup is on the wooden table.\nThe dog runs.\n")
    out = tmp_path / "out"
    done = interp(
        "reproduce", "--model", str(weights()), "--quick", "--pairs", "2", "--steps", "4", "--size", "32x32",
        "--prompts", str(tmp_path), "--only", "E2,E7", "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16 forward passes" in done.stderr  # printed before it begins
    assert "color.txt gives 3 prompts where the paper's PromptSet has 800." in html.unescape(
        (out / "report.html").read_text(encoding="utf-8")
    )
    assert set(json.loads((out / "numbers.json").read_text())) == {"E2", "E7"}
    prompts = xr.open_datatree(out / "trajectory.zarr", engine="zarr")["prompt"].values.tolist()
    assert len(prompts) == 2 and all(" and a" in p for p in prompts)


def test_blip_judges_other_models_beside_clip_and_decides() -> None:
    settings = Settings(model="some/model", blip_model="some/blip")
    recipe = Recipe("exchange", [], {}, {}, 4, None)
    assert metrics_of(recipe, settings) == ["clip", "blip_vqa", "clip_image"]
    assert metrics_of(recipe, replace(settings, blip_model=None)) == ["clip", "clip_image"]
    run = synthetic_run(samples=2, scores=False)
    run.write_scores({"clip:prompt": [0.1, 0.2], "blip_vqa:prompt": [0.3, 0.4]})
    assert judges(run) == ["blip_vqa", "clip"]


def test_coco_captions_take_the_place_of_prompts_in_one_experiment(tmp_path: Path) -> None:
    from interp.reproduction.catalog import chosen, wanted_runs
    from interp.reproduction.runs import recipes

    path = tmp_path / "captions.json"
    rows = [{"image_id": i, "id": i, "caption": f"a dog and {i} cats"} for i in range(4)]
    path.write_text(json.dumps({"annotations": rows}))
    settings = Settings(**TINY, coco=str(path))
    made = {r.name: r for r in recipes(settings, wanted_runs(chosen(None), settings))}
    assert set(made) == {"captions", "fewer_steps", "removal", "exchange", "attention", "trajectory"}
    for name, recipe in made.items():
        of_coco = all("cats" in row["prompt"] for row in recipe.rows)
        assert of_coco == (name in ("captions", "fewer_steps")), name
    assert not set(made["removal"].conditions) & {"no text in the last 3 steps"}

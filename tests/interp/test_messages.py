"""What a user reads after a mistake: one sentence that names what was asked, what exists, and what to do."""

import re

import pandas as pd
import pytest
import torch

import interp
from interp.interventions import from_spec
from tests.interp.reference import SCALE, tiny

A = "a red circle"


def said(act):
    """The message of the InterpError that `act` raises: one line, one sentence, no traceback."""
    with pytest.raises(interp.InterpError) as caught:
        act()
    text = str(caught.value)
    assert text and "\n" not in text and "Traceback" not in text and len(text) < 700, text
    assert not re.search(r"\. [A-Z]", text), f"more than one sentence: {text}"
    return text


def trace(*args, **more):
    """A call that must be refused before anything runs."""
    pipe, runs = tiny("sd1"), []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: runs.append(1))
    try:
        return interp.trace(pipe, *(args or (A,)), **{"steps": 4, "guidance_scale": SCALE, "progress": False, **more})
    finally:
        handle.remove()
        assert not runs, "refused only after work was done"


def expect(text, *parts):
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


def test_unknown_model(tmp_path):
    expect(said(lambda: interp.load("scene")), "unknown model 'scene'", "did you mean 'scenes'", "Hub id")
    expect(said(lambda: interp.load("./nowhere")), "'./nowhere'", "no folder")
    expect(said(lambda: interp.load(str(tmp_path))), "no model_index.json")
    expect(said(lambda: interp.load(3)), "cannot load a int", "diffusers pipeline")
    expect(said(lambda: interp.load("nobody/nothing-of-that-name")), "'nobody/nothing-of-that-name'", "Hub id")


def test_a_pipeline_of_no_family():
    class Other:
        scheduler = None

        def __call__(self):
            pass

    expect(said(lambda: interp.HookRegistry(Other())), "no model family describes a Other", "'unet'")


def test_capture():
    expect(said(lambda: interp.Capture(head="all")), "no field 'head'", "did you mean 'heads'", "tokens")
    expect(said(lambda: interp.Capture.from_spec({"tokenz": "all"})), "no field 'tokenz'", "did you mean 'tokens'")
    expect(said(lambda: interp.Capture(heads="men")), "heads='men'", "'mean'", "'all'")
    expect(said(lambda: interp.Capture(tokens="promt")), "tokens='promt'", "did you mean 'prompt'")
    expect(said(lambda: interp.Capture(dtype="int8")), "dtype='int8'", "'float16'", "'float32'")
    expect(said(lambda: interp.Capture(branches=("con",))), "branches=['con']", "'cond' or 'uncond'")
    for steps in (3, "ten", [], True, [0.5]):
        expect(said(lambda steps=steps: interp.Capture(steps=steps)), "list of step numbers", repr(steps))
    expect(said(lambda: trace(capture=interp.Capture(steps=slice(9, 12)))), "none of the run's steps 0–3")
    for name in ("latents", "noise_pred", "image"):
        expect(said(lambda name=name: interp.Capture(**{name: "maybe"})), f"{name}='maybe'", "True or False")
    expect(said(lambda: interp.Capture(attention=True)), "attention=True", "glob", "None")
    expect(said(lambda: interp.Capture(sites=[3])), "sites=[3]", "glob")
    expect(said(lambda: interp.Capture(heads=3)), "heads=3", "list of indices")
    expect(said(lambda: interp.Capture(tokens=2.5)), "tokens=2.5", "positions, words and roles")
    expect(said(lambda: interp.Capture(dtype=torch.float16)), "'float16' or 'float32'")
    expect(said(lambda: interp.Capture(mantissa="7")), "mantissa='7'", "bits")
    expect(said(lambda: interp.Capture(steps=1.5)), "steps=1.5", "(0, 1]")
    expect(said(lambda: trace(capture=interp.Capture(steps=[9]))), "step 9", "0–3")
    expect(said(lambda: trace(capture=interp.Capture(heads=[8]))), "heads=[8]", "0–3")
    expect(said(lambda: trace(capture=interp.Capture(tokens=[77]))), "tokens=[77]", "0–76")
    expect(said(lambda: trace(capture=interp.Capture(attention="*attn3"))), "attention='*attn3'", "has 8")
    expect(said(lambda: trace(capture=interp.Capture(attention="cros"))), "'cros'", "did you mean 'cross'")
    expect(said(lambda: trace(capture=interp.Capture(sites=("unet.mid_blok:out",)))), "did you mean 'unet.mid_block'")
    text = said(lambda: trace(capture=interp.Capture(sites=("unet.time_embedding:update",))))
    expect(text, "unet.time_embedding:update", "residual block")


def test_a_prompt_that_is_too_long():
    long = " ".join(["red"] * 75 + ["circle", "on", "a", "square"])
    expect(said(lambda: trace(long)), "79 tokens", "75", "'circle on a square'", "shorten the prompt")
    expect(said(lambda: trace(A, negative_prompt=long)), "'circle on a square'")
    change = interp.ReplacePrompt(long)
    expect(said(lambda: trace(interventions=[change])), "'circle on a square'")


def test_windows():
    remove = interp.RemoveText
    expect(said(lambda: trace(interventions=[remove(start=9, unit="step")])), "outside the run", "0–3", "start=9")
    expect(said(lambda: trace(interventions=[remove(stop=5, unit="step")])), "outside the run", "0–3")
    expect(said(lambda: trace(interventions=[remove(start=-1, unit="step")])), "outside the run")
    expect(said(lambda: trace(interventions=[remove(start=1e-4, unit="sigma")])), "outside the run", "sigma falls from")
    expect(said(lambda: trace(interventions=[remove(stop=5000, unit="timestep")])), "timestep falls from 751 to 1")
    expect(said(lambda: remove(start=3)), "within 0 and 1", "unit='step'", "start=3")
    expect(said(lambda: remove(start=0.8, stop=0.2)), "ends before it starts")
    expect(said(lambda: remove(start="0.6")), "are numbers")
    expect(said(lambda: remove(unit="steps")), "'fraction', 'step', 'sigma' or 'timestep'", "did you mean 'step'")
    expect(said(lambda: from_spec({"name": "remove_text", "unit": "percent"})), "unit of a window", "'percent'")


def test_windows_that_fall_the_wrong_way():
    """For sigma and timestep start is the larger one: the other way round would be an empty window, silently."""
    for window in ({"start": 200, "stop": 600, "unit": "timestep"}, {"start": 1.0, "stop": 3.0, "unit": "sigma"}):
        said(lambda window=window: trace(interventions=[interp.RemoveText(**window)]))


def test_interventions():
    expect(said(lambda: trace(interventions=[interp.RemoveText()], guidance_scale=1.0)), "RemoveText", "guidance")
    expect(said(lambda: trace(interventions=[interp.RemoveGuidance()], guidance_scale=1.0)), "RemoveGuidance")
    expect(said(lambda: trace(interventions=["remove_text"])), "'remove_text' is no intervention", "interp.RemoveText")
    bare = interp.RemoveText(start=0.5)
    expect(said(lambda: trace(interventions=bare)), "write [RemoveText(start=0.5)]")
    expect(said(lambda: trace(conditions={"late": bare})), "write [RemoveText(start=0.5)]")
    expect(said(lambda: trace(interventions=[interp.ReplacePrompt("a {red")])), "'a {red'", "lone brace")
    expect(said(lambda: from_spec({"name": "remove_txt"})), "remove_txt", "did you mean 'remove_text'")
    expect(said(lambda: from_spec({"name": "remove_text", "begin": 1})), "no field 'begin'", "start, stop, unit")
    expect(said(lambda: interp.ReplaceEOS(A, side="kw")), "side is 'kv', 'k' or 'v'")
    expect(said(lambda: interp.ReplaceEOS(A, align="eos")), "'first_eos' or 'position'")
    expect(said(lambda: interp.ReplacePrompt(A, pooled="kep")), "'replace', 'keep'", "did you mean 'keep'")
    text = said(lambda: trace(interventions=[interp.RemoveText(start=0.5), interp.RemoveGuidance(stop=0.75)]))
    expect(text, "RemoveText(start=0.5)", "RemoveGuidance(stop=0.75)", "step 2", "do not overlap")
    text = said(lambda: trace(interventions=[interp.ReplacePrompt(A, layers="*attn9")]))
    expect(text, "*attn9", "cross-attention")


def test_columns():
    table = [{"prompt": A, "target": "a cat"}]
    text = said(lambda: trace(table, interventions=[interp.ReplacePrompt("{targt}")]))
    expect(text, "'targt'", "did you mean 'target'", "'prompt'")
    expect(said(lambda: trace([{"prompts": A}])), "no column 'prompt'", "'prompts'")
    expect(said(lambda: trace([])), "empty")
    expect(said(lambda: trace(pd.DataFrame({"prompt": []}))), "empty")
    expect(said(lambda: trace([A, 3])), "list of strings or of dicts", "int")
    expect(said(lambda: trace({"prompt": A})), "not a dict")
    expect(said(lambda: trace([{"prompt": A, "seed": 3}])), "column 'seed'", "rename")
    expect(said(lambda: trace([{"prompt": A, "mask": [1, 2]}])), "row 0", "list", "'mask'")
    expect(said(lambda: trace([{"prompt": A, "target": "a cat"}, {"prompt": A}])), "row 1", "'target'")
    expect(said(lambda: trace("nowhere.csv")), "no such prompt file", "nowhere.csv")
    expect(said(lambda: trace([{"prompt": 3}])), "prompt")


@pytest.mark.parametrize("seeds", [[], [1, 1], "abc", [1.5], None, [None], True, ["a"]], ids=str)
def test_seeds(seeds):
    expect(said(lambda: trace(seeds=seeds)), "seeds=")


def test_numbers_from_numpy_are_numbers():
    import numpy as np

    plan = interp.plan(tiny("sd1"), A, seeds=np.arange(3), steps=2, capture=interp.Capture(attention=None))
    assert plan.layout.samples["seed"] == [0, 1, 2]
    for seed in (np.int64(3), torch.tensor(3).item()):
        assert interp.plan(tiny("sd1"), A, seeds=seed, steps=2).layout.samples["seed"] == [3]


@pytest.mark.parametrize("steps", [0, -1, 2.5, "ten", None], ids=str)
def test_steps(steps):
    expect(said(lambda: trace(steps=steps)), "steps=", "at least 1")


@pytest.mark.parametrize("batch_size", [0, -2, 1.5, "large", None], ids=str)
def test_batch_size(batch_size):
    expect(said(lambda: trace(batch_size=batch_size)), "batch_size=", "at least 1", "'auto'")


def test_sizes_and_conditions():
    expect(said(lambda: trace(height=33)), "33", "multiples of 8")
    expect(said(lambda: trace(conditions={})), "conditions= is empty")
    expect(said(lambda: trace(conditions={"a": []}, interventions=[])), "not both")
    expect(said(lambda: trace(guidance_scale="strong")), "guidance_scale='strong'")


def test_arguments_of_another_kind():
    expect(said(lambda: trace(None)), "prompts=None", "list of texts")
    expect(said(lambda: trace(3)), "prompts=3")
    expect(said(lambda: trace(capture={"heads": "all"})), "give a Capture")
    expect(said(lambda: trace(conditions=["late"])), "conditions=['late']", "by name")
    expect(said(lambda: trace(conditions={"late": None})), "{'late': None}", "a list of interventions")
    expect(said(lambda: trace(conditions={" ": []})), "a condition is a name")
    expect(said(lambda: trace(options=[1])), "options=[1]", "by name")
    for side in ("128", 128.0, -8, 0):
        expect(said(lambda side=side: trace(height=side)), f"height={side!r}", "pixels")
    expect(said(lambda: trace(seeds=2**70)), "63 bits")
    expect(said(lambda: trace(store=3)), "store=3", "path")
    expect(said(lambda: trace(scores=3)), "scores=3", "names of metrics")
    expect(said(lambda: interp.open_run(None)), "None", "no path")
    expect(said(lambda: interp.sites(tiny("sd1"), 3)), "3 is no name of a site")
    expect(said(lambda: interp.HookRegistry(tiny("sd1")).read("unet.mid_block:out", 3)), "fn(tensor, at)")
    run = interp.trace(tiny("sd1"), A, steps=1, guidance_scale=SCALE, progress=False)
    expect(said(lambda: run.isel("a")), "'a'", "sel(column=value)")
    expect(said(lambda: run.probe("frequency_energy", low_fraction="a")), "low_fraction='a'")
    expect(said(lambda: run.probe("token_attribution", layers=[99])), "no captured layer matches 99")


def test_the_same_words_from_plan():
    pipe = tiny("sd1")
    for arguments in ({"seeds": []}, {"steps": 0}, {"interventions": [interp.RemoveText(start=9, unit="step")]}):
        more = {"steps": 4, "guidance_scale": SCALE, **arguments}
        planned = said(lambda more=more: interp.plan(pipe, A, **more))
        assert planned == said(lambda more=more: trace(**more))


def test_scores_are_checked_before_anything_runs():
    expect(said(lambda: trace(scores=["clp"])), "no metric named 'clp'", "did you mean 'clip'")
    expect(said(lambda: trace(scores="clp")), "'clp'")
    expect(said(lambda: trace(scores=["clip:target"])), "column 'target'", "'prompt'")
    expect(said(lambda: trace(scores=["l1"], conditions={"late": []})), "condition 'baseline'", "'late'")
    expect(said(lambda: trace(scores=["clip"], capture=interp.Capture(image=False))), "pictures", "image=False")


def test_recording():
    pipe = tiny("sd1")
    with interp.record(pipe) as recording:
        expect(said(lambda: recording.run), "nothing was recorded")
        embeddings = torch.zeros(1, 77, 32)
        text = said(lambda: pipe(prompt_embeds=embeddings, negative_prompt_embeds=embeddings, num_inference_steps=1))
        expect(text, "prompt=", "embeddings")
        expect(said(lambda: pipe(A, timesteps=[500, 1])), "custom timesteps")
        pipe(A, num_inference_steps=1, output_type="latent")
        text = said(lambda: pipe(A, num_inference_steps=2, output_type="latent"))
        expect(text, "steps=1", "2", "another run")
    assert len(recording.run.done) == 1


def test_sites():
    pipe = tiny("sd1")
    expect(said(lambda: interp.sites(pipe, "*attn3*")), "no site matches '*attn3*'", "interp.sites(pipe)")
    hooks = interp.HookRegistry(pipe)
    expect(said(lambda: hooks.read("unet.mid_block:probs", print)), "unet.mid_block:probs")
    with pytest.raises(interp.InterpError, match="can be read but not written"), hooks:
        hooks.write("*attn2:q", lambda x, at: x)
        pipe(A, num_inference_steps=1)

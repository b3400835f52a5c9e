from functools import partial

import numpy as np
import pytest
import xarray as xr

from interp.probes.attribution import attention_mass, token_attribution
from interp.probes.maps import chosen_steps, resize, resize_matrix
from interp.probes.words import chosen_words, prompt_words
from interp.stores import InterpError, synthetic_run
from tests.probes.handmade import attention, make_run

daam = partial(token_attribution, recipe="daam")
TEXTS = [["<s>", "red", "tea", "pot", "red", "</s>", "</s>"], ["<s>", "cat", "</s>", "</s>", "", "", ""]]
ROLES = [["bos", "word", "word", "word", "word", "eos", "pad"], ["bos", "word", "eos", "pad", "", "", ""]]
WORDS = [[-1, 0, 1, 1, 2, -1, -1], [-1, 0, -1, -1, -1, -1, -1]]
COUNTS = [[1, 1, 1, 1, 1, 1, 14], [1, 1, 1, 17, 0, 0, 0]]


def random_probs(shape, seed=0):
    """Probabilities over the tokens (axis −3), NaN in the columns that a sample does not use."""
    probs = np.random.default_rng(seed).uniform(0.1, 1, shape)
    for i, roles in enumerate(ROLES):
        used = np.array([role != "" for role in roles])
        probs[i] = np.where(used[:, None, None], probs[i], 0)
        probs[i] /= probs[i].sum(-3, keepdims=True)
        probs[i] = np.where(used[:, None, None], probs[i], np.nan)
    return probs


def two_grids(seed=0):
    """Two samples, 3 steps; 4×6 with two layers and 8×12 with one, two heads, branches cond and uncond."""
    coarse = random_probs((2, 3, 2, 2, 2, 7, 4, 6), seed)
    fine = random_probs((2, 3, 2, 1, 2, 7, 8, 12), seed + 1)
    branches = ("cond", "uncond")
    nodes = {
        "attention/4x6": attention(coarse, TEXTS, ROLES, WORDS, COUNTS, layers=["down.0", "down.1"], branches=branches),
        "attention/8x12": attention(fine, TEXTS, ROLES, WORDS, COUNTS, layers=["up.0"], branches=branches),
    }
    return make_run(nodes, prompt=["red teapot red", "cat"]), coarse, fine


def slow_resize(image, height, width):
    """Bicubic by the book, one output pixel at a time."""

    def weight(d, a=-0.75):
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    old_h, old_w = image.shape
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            cy, cx = (y + 0.5) * old_h / height - 0.5, (x + 0.5) * old_w / width - 0.5
            for j in range(int(np.floor(cy)) - 1, int(np.floor(cy)) + 3):
                for i in range(int(np.floor(cx)) - 1, int(np.floor(cx)) + 3):
                    pixel = image[min(max(j, 0), old_h - 1), min(max(i, 0), old_w - 1)]
                    out[y, x] += weight(cy - j) * weight(cx - i) * pixel
    return np.maximum(out, 0)


@pytest.mark.parametrize("to", [(4, 6), (8, 12), (7, 5), (3, 20)])
def test_resizing_is_bicubic(to):
    image = np.random.default_rng(0).uniform(size=(4, 6)) ** 4
    assert np.allclose(resize(image, *to), slow_resize(image, *to))
    assert np.allclose(resize_matrix(4, to[0]).sum(1), 1)


def test_maps_equal_plain_loops():
    run, coarse, fine = two_grids()
    ds = daam(run, normalize="none", grid="8x12")
    for i, roles in enumerate(ROLES):
        for token, role in enumerate(roles):
            if role == "":
                assert np.isnan(ds.token_map[i, token]).all()
                continue
            layers = []
            for probs in (coarse[:, :, :, 0], coarse[:, :, :, 1], fine[:, :, :, 0]):
                heads = [probs[i, :, 0, head, token].mean(0) for head in range(2)]
                layers.append(np.mean([slow_resize(m, 8, 12) for m in heads], axis=0))
            assert np.allclose(ds.token_map[i, token], np.mean(layers, axis=0))


def test_a_delta_is_found_where_it_is():
    probs = np.zeros((1, 2, 1, 1, 1, 3, 5, 8))
    probs[..., 1, 3, 6] = 1.0
    probs[..., 0, :, :] = 1 - probs[..., 1, :, :]
    run = make_run(
        {"attention/5x8": attention(probs, [["<s>", "dot", "</s>"]], [["bos", "word", "eos"]], [[-1, 0, -1]])}
    )
    ds = daam(run, grid="10x16")
    word = ds.word_map[0, 0].values
    assert ds.word_text.values.tolist() == [["dot"]]
    assert np.unravel_index(word.argmax(), word.shape) in [(y, x) for y in (6, 7) for x in (12, 13)]
    assert word[:2].max() == 0 and word[:, :9].max() == 0  # a cubic reaches two old pixels far
    assert word[:4].max() < 0.01
    same = daam(run)  # without latents: the captured grid, untouched
    assert np.array_equal(same.word_map[0, 0], probs[0, 0, 0, 0, 0, 1])


def test_words_merge_sub_tokens_and_tell_occurrences_apart():
    run, *_ = two_grids()
    ds = daam(run, normalize="none")
    assert ds.word_text.values.tolist() == [["red", "teapot", "red"], ["cat", "", ""]]
    assert ds.word_occurrence.values.tolist() == [[0, 0, 1], [0, -1, -1]]
    token = ds.token_map.values
    assert np.allclose(ds.word_map[0], [token[0, 1], (token[0, 2] + token[0, 3]) / 2, token[0, 4]])
    assert np.allclose(ds.word_map[1, 0], token[1, 1]) and np.isnan(ds.word_map[1, 1:]).all()
    chosen = daam(run, normalize="none", words=["Red", ("red", 1), "red#1", "cat"])
    assert np.allclose(chosen.word_map[0, :3], token[0, [1, 4, 4]]) and np.isnan(chosen.word_map[0, 3]).all()
    assert chosen.word_text.values.tolist() == [["red", "red", "red", ""], ["", "", "", "cat"]]


def test_spans_are_words_in_a_row():
    run, *_ = two_grids()
    ds = daam(run, normalize="none", words=["teapot red", "RED teapot", "cat", "red#1"])
    token = ds.token_map.values
    assert ds.word_text.values.tolist() == [["teapot red", "red teapot", "", "red"], ["", "", "cat", ""]]
    assert np.allclose(ds.word_map[0, 0], token[0, 2:5].mean(0))
    assert np.allclose(ds.word_map[0, 1], token[0, 1:4].mean(0)) and np.isnan(ds.word_map[1, 1]).all()
    twice = prompt_words(["a", "dog", "a", "dog"], ["word"] * 4, [0, 1, 2, 3])
    assert [(w, n) for w, n, _ in twice] == [("a", 0), ("dog", 0), ("a", 1), ("dog", 1)]
    table = xr.Dataset({k: (("sample", "token"), [v]) for k, v in
                        {"text": ["a", "dog"] * 2, "role": ["word"] * 4, "word": [0, 1, 2, 3]}.items()})  # fmt: skip
    second = chosen_words(table, [("a dog", 1)])
    assert second.member[0, 0].tolist() == [False, False, True, True] and second.occurrence[0, 0] == 1


def test_word_marks_of_tokenizers_are_left_out():
    found = prompt_words(["tea", "pot</w>", "▁tea", "Ġpot"], ["word"] * 4, [0, 0, 1, 1])
    assert [(w, n) for w, n, _ in found] == [("teapot", 0), ("teapot", 1)]


def test_normalisations():
    run, *_ = two_grids()
    maps = {n: daam(run, normalize=n) for n in ("token", "words", "space", "max", "none")}
    raw = maps["none"].token_map
    assert np.allclose(maps["token"].token_map.sum("token"), 1)
    words = (maps["words"].token_map * (maps["words"].token_role == "word")).sum("token")
    assert np.allclose(words, 1)
    for n, total in (("space", raw.sum(["y", "x"])), ("max", raw.max(["y", "x"]))):
        xr.testing.assert_allclose(maps[n].token_map, raw / total.where(raw.notnull().any(["y", "x"])))
    assert np.allclose(maps["space"].word_map.sum(["y", "x"])[0], 1)
    assert len({m.token_map.units for m in maps.values()}) == 5


def test_steps_and_layers_are_chosen():
    run, coarse, fine = two_grids()
    one = daam(run, layers="up.*", steps=[2], normalize="none")
    assert np.allclose(one.token_map[0], fine[0, 2, 0, 0, :].mean(0), equal_nan=True)
    assert one.layer.values.tolist() == ["up.0"] and one.step.values.tolist() == [2]
    part = daam(run, layers=["down.1", "up.0"], steps="1:", normalize="none", grid="4x6")
    assert part.grid.values.tolist() == ["8x12", "4x6"]
    expected = coarse[0, 1:, 0, 1, :, 1].mean(0)
    shrunk = [slow_resize(fine[0, 1:, 0, 0, h, 1].mean(0), 4, 6) for h in range(2)]
    assert np.allclose(part.token_map[0, 1], (expected.mean(0) + np.mean(shrunk, axis=0)) / 2)


def test_steps_without_the_branch_are_left_out():
    run, coarse, _ = two_grids()
    probs = coarse.copy()
    probs[0, 1:, 0] = np.nan
    node = attention(probs, TEXTS, ROLES, WORDS, COUNTS, branches=("cond", "uncond"))
    run = make_run({"attention/4x6": node})
    ds = daam(run, normalize="none")
    assert np.allclose(ds.token_map[0], coarse[0, 0, 0].mean((0, 1)), equal_nan=True)
    assert np.isnan(ds.mass[0, 1:]).all() and np.isfinite(ds.mass[1]).any("role").all()
    assert np.isnan(daam(run, steps=[1], normalize="none").token_map[0]).all()


def test_mass_sums_to_one_and_equals_plain_loops():
    run, coarse, fine = two_grids()
    ds = attention_mass(run)
    assert ds.mass.dims == ("sample", "step", "layer", "role")
    assert np.allclose(ds.mass.sum("role"), 1)
    assert ds.grid.values.tolist() == ["8x12", "4x6", "4x6"]
    everything = [fine[:, :, 0, 0], coarse[:, :, 0, 0], coarse[:, :, 0, 1]]
    for i, roles in enumerate(ROLES):
        for step in range(3):
            for k, probs in enumerate(everything):
                for role in ("bos", "word", "eos", "pad"):
                    columns = [t for t, r in enumerate(roles) if r == role]
                    total = sum(probs[i, step, :, t].mean() for t in columns)
                    number = sum(COUNTS[i][t] for t in columns)
                    got = ds.isel(sample=i, step=step, layer=k).sel(role=role)
                    assert float(got.mass) == pytest.approx(total)
                    assert float(got.mass_per_token) == pytest.approx(total / number)
    both = daam(run)
    xr.testing.assert_equal(both.mass, ds.mass)


def test_a_role_without_tokens_is_nan():
    probs = np.full((1, 1, 1, 1, 1, 2, 2, 2), 0.5)
    node = attention(probs, [["<s>", "a"]], [["bos", "word"]], [[-1, 0]])
    ds = attention_mass(make_run({"attention/2x2": node}))
    assert np.isnan(ds.mass.sel(role=["eos", "pad"])).all() and np.allclose(ds.mass.sel(role="bos"), 0.5)


def test_half_precision_and_latent_grid():
    run = synthetic_run(samples=2, grids=("8x8", "16x12"), heads=2)
    ds = daam(run)
    assert ds.token_map.sizes["y"] == ds.token_map.sizes["x"] == 16
    assert np.allclose(ds.token_map.sum("token"), 1) and np.allclose(ds.mass.sum("role"), 1, atol=1e-2)


def test_choosing_steps():
    captured = np.array([0, 5, 10, 15])
    assert chosen_steps(captured, None).tolist() == [0, 1, 2, 3]
    assert chosen_steps(captured, slice(5, 15)).tolist() == [1, 2]
    assert chosen_steps(captured, "10:").tolist() == [2, 3]
    assert chosen_steps(captured, 15).tolist() == [3]
    assert chosen_steps(captured, [10, 0]).tolist() == [2, 0]


def test_mistakes_are_sentences():
    run, *_ = two_grids()
    for kwargs, text in (
        ({"steps": [7]}, r"not captured at \[7\]; this run has steps 0, 1, 2"),
        ({"steps": "9:"}, "not captured at"),
        ({"steps": "a:b"}, "is not a range"),
        ({"steps": slice(-2, None)}, "half-open range of steps"),
        ({"layers": "up.7"}, "no captured layer matches 'up.7'; this run has .*; did you mean 'up.0'"),
        ({"words": "tepot"}, "has the word 'tepot'; did you mean 'teapot'"),
        ({"words": [("red", 2)]}, "has 'red' 3 times"),
        ({"words": "red red"}, "has the words 'red red' one after the other$"),
        ({"words": "red tepot"}, "nor the word 'tepot'; did you mean 'teapot'"),
        ({"words": [("red teapot", 1)]}, "has 'red teapot' 2 times"),
        ({"words": [3]}, "neither a word nor a pair"),
        ({"normalize": "pixels"}, "normalize='pixels' is not possible"),
        ({"grid": "big"}, "grid='big' is not possible"),
    ):
        with pytest.raises(InterpError, match=text):
            daam(run, **kwargs)
    only_uncond = synthetic_run(branches=("uncond",))
    with pytest.raises(InterpError, match=r"needs the branch 'cond'.*Capture\(branches"):
        attention_mass(only_uncond)


def test_the_rival_recipe_equals_plain_loops():
    """Logarithms averaged over steps, heads and layers; words are means of tokens; less the strongest other word."""
    run, coarse, _fine = two_grids()
    ds = token_attribution(run, grid="4x6", layers="down.*", words=["red", "teapot", "red#1", "teapot red", "cat"])
    assert ds.attrs["normalize"] == "rival" and "nats" in ds.word_map.units
    log = np.log(coarse[:, :, 0].astype("float64")).mean((1, 2, 3))  # of both samples: (sample, token, y, x)
    red, teapot, again = log[0, 1], log[0, 2:4].mean(0), log[0, 4]
    span = log[0, 2:5].mean(0)
    wanted = [
        red - np.maximum(teapot, again),
        teapot - np.maximum(red, again),
        again - np.maximum(red, teapot),
        span - red,
    ]
    np.testing.assert_allclose(ds.word_map[0, :4], wanted, atol=1e-9)
    assert np.isnan(ds.word_map[0, 4]).all()
    # tokens: a sub-token has no rival in its own word; bos has every word
    np.testing.assert_allclose(ds.token_map[0, 2], log[0, 2] - np.maximum(red, again), atol=1e-9)
    np.testing.assert_allclose(ds.token_map[0, 0], log[0, 0] - np.max([red, teapot, again], 0), atol=1e-9)
    # a prompt of one word has the other tokens as rivals
    np.testing.assert_allclose(ds.word_map[1, 4], log[1, 1] - log[1, [0, 2, 3]].max(0), atol=1e-9)
    assert np.isnan(ds.token_map[1, 4:]).all()


def test_the_rival_recipe_ignores_what_all_words_share():
    """A head that looks at every word alike changes nothing, and neither does the attention that BOS takes."""
    run, coarse, _ = two_grids()
    before = token_attribution(run, layers="down.*").word_map
    dimmed = coarse.copy()
    dimmed[0, :, :, :, :, 1:5] *= np.linspace(0.1, 1, 24).reshape(4, 6)
    node = run.tree["attention/4x6"].to_dataset(inherit=False)
    run.tree["attention/4x6"].dataset = node.assign(probs=node.probs.copy(data=dimmed))
    np.testing.assert_allclose(token_attribution(run, layers="down.*").word_map[0], before[0], atol=1e-6)


@pytest.mark.parametrize("how", ["token", "words", "space", "max", "none"])
def test_the_rival_recipe_takes_other_normalisations(how):
    run, coarse, _ = two_grids()
    ds = token_attribution(run, layers="down.*", grid="4x6", normalize=how)
    values = np.exp(np.log(coarse[0, :, 0].astype("float64")).mean((0, 1, 2)))  # geometric means (token, y, x)
    divisor = {
        "token": values.sum(0), "words": values[1:5].sum(0), "none": 1.0,
        "space": values.sum((1, 2), keepdims=True), "max": values.max((1, 2), keepdims=True),
    }[how]  # fmt: skip
    np.testing.assert_allclose(ds.token_map[0], values / divisor, rtol=1e-9)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InterpError, match="recipe='dam' is not possible; it is one of 'rival', 'daam'"):
        token_attribution(two_grids()[0], recipe="dam")


def with_self_attention(seed=0):
    """The run of two grids with self-attention of 4×6, two layers and heads; the second step was not evaluated."""
    run, _, _ = two_grids(seed)
    probs = np.random.default_rng(seed).uniform(0, 1, (2, 3, 1, 2, 2, 4, 6, 4, 6))
    probs /= probs.sum((-1, -2), keepdims=True)
    probs[:, 1] = np.nan
    dims = ("sample", "step", "branch", "layer", "head", "query_y", "query_x", "key_y", "key_x")
    coords = {"step": np.arange(3), "branch": ["cond"], "layer": ["down.0", "down.1"], "head": ["0", "1"]}
    tree = run.tree.copy()
    tree["self_attention/4x6"] = xr.DataTree(xr.Dataset({"probs": (dims, probs)}, coords))
    return type(run)(tree), run, probs


def test_maps_walk_along_self_attention():
    """Each pixel gets the mean of the pixels it looks at, weighed by how much, of the grid of the maps themselves."""
    run, plain, probs = with_self_attention()
    before, ds = (token_attribution(r, grid="4x6") for r in (plain, run))
    assert (before.attrs["spread"], ds.attrs["spread"]) == (0, 1)
    for i in range(2):
        chances = probs[i, [0, 2]].mean((0, 1, 2, 3)).reshape(24, 24)
        for name in ("word_map", "token_map"):
            old, new = before[name].values[i].reshape(-1, 24), ds[name].values[i].reshape(-1, 24)
            for word in range(len(old)):
                by_hand = [sum(chances[q, k] * old[word, k] for k in range(24)) for q in range(24)]
                assert np.allclose(new[word], by_hand, equal_nan=True)
    twice = token_attribution(run, grid="4x6", spread=2)
    again = np.einsum(
        "qk,wk->wq", probs[0, [0, 2]].mean((0, 1, 2, 3)).reshape(24, 24), ds.word_map[0].values.reshape(-1, 24)
    )
    assert np.allclose(twice.word_map[0].values.reshape(-1, 24), again, equal_nan=True)
    assert token_attribution(run, spread=0).word_map.equals(token_attribution(plain).word_map)
    assert daam(run).word_map.equals(daam(plain).word_map)
    walked = daam(run, spread=1)
    assert np.allclose(walked.token_map.sum("token"), 1)  # shares of a pixel stay shares
    averaged = run.tree.copy()
    for grid in run.grids:
        node = run.tree[f"attention/{grid}"].to_dataset()
        averaged[f"attention/{grid}"] = xr.DataTree(node.isel(head=[0]).assign_coords(head=["mean"]))
    assert token_attribution(type(run)(averaged), grid="4x6").attrs["spread"] == 2
    assert token_attribution(run, grid="8x12").word_map.shape[-2:] == (8, 12)


def test_a_walk_needs_self_attention_of_the_whole_picture():
    run, plain, _ = with_self_attention()
    for options, text in (
        ({"spread": 1}, "needs self-attention of the whole picture"),
        ({"spread": -1}, "spread=-1 is not"),
    ):
        with pytest.raises(InterpError, match=text):
            token_attribution(plain, **options)
    tree = run.tree.copy()
    tree["self_attention/4x6"] = xr.DataTree(run.tree["self_attention/4x6"].to_dataset().isel(query_y=[0, 1]))
    assert token_attribution(type(run)(tree)).attrs["spread"] == 0  # a region alone

import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy

from interp.probes.substitution import key_value_substitution
from interp.probes.testing import changed_run
from interp.stores import InterpError
from tests.probes.handmade import attention, make_run, scores, trajectory

CONDITIONS = ["baseline", "keys", "values", "all"]
SPECS = {
    c: [{"name": "replace_eos", "prompt": "{target}", "side": s}]
    for c, s in zip(CONDITIONS[1:], ("k", "v", "kv"), strict=True)
}
TEXTS, ROLES, WORDS, COUNTS = (
    ["<s>", "cat", "</s>", "</s>"],
    ["bos", "word", "eos", "pad"],
    [-1, 0, -1, -1],
    [1, 1, 1, 17],
)


def hand_run(probs=None, prompts=2, specs=None):
    n = 4 * prompts
    final = np.random.default_rng(0).standard_normal((n, 1, 4, 4))
    node = trajectory(np.repeat(final[:, None], 3, 1), final, [0.1, 0.5, 0.9], [0.9, 0.5, 0.1])
    nodes = {"trajectory": node, "scores": scores(clip__prompt=np.arange(n) / 10, clip__target=1 - np.arange(n) / 10)}
    for p in probs or ():
        nodes[f"attention/{p.shape[-2]}x{p.shape[-1]}"] = attention(
            p, [TEXTS] * n, [ROLES] * n, [WORDS] * n, [COUNTS] * n
        )
    table = {"condition": np.repeat(CONDITIONS, prompts).tolist(), "prompt_id": list(range(prompts)) * 4}
    run = make_run(nodes, prompt=[f"p{i}" for i in table["prompt_id"]], **table)
    run.tree.attrs["conditions"] = {"baseline": [], **(SPECS if specs is None else specs)}
    return run, final.astype("float32").astype(float)


def random_probs(layers, heads, size, seed=0):
    probs = np.random.default_rng(seed).uniform(0.01, 1, (8, 3, 1, layers, heads, 4, size, size)) ** 2
    return probs / probs.sum(5, keepdims=True)


def test_divergences_equal_scipys():
    fine, coarse = random_probs(2, 2, 4), random_probs(1, 3, 2, seed=1)
    run, _ = hand_run([fine, coarse])
    ds = key_value_substitution(run)
    even = np.array(COUNTS) / 20
    for c in range(4):
        for p in range(2):
            i, ref = 2 * c + p, p
            for s in range(3):
                kls, flat = [], []
                for probs in (fine, coarse):
                    for layer in range(probs.shape[3]):
                        mine, its = probs[i, s, 0, layer], probs[ref, s, 0, layer]
                        kls.append(scipy_entropy(mine, its, axis=1).mean())
                        flat.append(scipy_entropy(its, even[None, :, None, None] + 0 * its, axis=1).mean())
                assert float(ds.divergence[c, p, s]) == pytest.approx(np.mean(kls), abs=1e-12)
                assert float(ds.divergence_uniform[p, s]) == pytest.approx(np.mean(flat))
    assert np.allclose(ds.divergence_mean, ds.divergence.mean("pair"))
    low, high = ds.divergence_interval.sel(bound="low"), ds.divergence_interval.sel(bound="high")
    assert (low[1:] <= ds.divergence_mean[1:]).all() and (ds.divergence_mean[1:] <= high[1:]).all()


def test_a_map_of_zeros_in_half_precision_is_finite():
    probs = random_probs(1, 1, 2)
    probs[:2, :, :, :, :, 3], probs[:2, :, :, :, :, 0] = 0.0, probs[:2, :, :, :, :, 0] + probs[:2, :, :, :, :, 3]
    ds = key_value_substitution(hand_run([probs.astype("float16")])[0])
    assert np.isfinite(ds.divergence).all() and (ds.divergence[1:] > 1).all() and np.allclose(ds.divergence[0], 0)


def test_tokens_not_captured_count_once_and_have_no_uniform():
    probs = random_probs(1, 1, 2) * 0.5
    ds = key_value_substitution(hand_run([probs])[0])
    whole = np.concatenate([probs, np.full_like(probs[..., :1, :, :], 0.5)], axis=5)
    expected = scipy_entropy(whole[2, 1, 0, 0], whole[0, 1, 0, 0], axis=1).mean()
    assert float(ds.divergence[1, 0, 1]) == pytest.approx(expected)
    assert np.isnan(ds.divergence_uniform).all()


def test_sides_are_found_and_distances_to_both_are_norms():
    run, final = hand_run()
    ds = key_value_substitution(run)
    assert ds.condition.values.tolist() == CONDITIONS and ds.side.values.tolist() == ["", "k", "v", "kv"]
    assert "divergence" not in ds
    for c in range(4):
        for p in range(2):
            for name, ref in (("latent_distance", final[p]), ("latent_distance_to_both", final[6 + p])):
                gap = np.linalg.norm(final[2 * c + p] - ref) / np.linalg.norm(ref)
                assert float(ds[name][c, p]) == pytest.approx(gap)
    assert np.allclose(ds.score.sel(condition="values", metric="clip:target"), [0.6, 0.5])
    named = key_value_substitution(run, key="values", value="keys")
    assert named.condition.values.tolist() == ["baseline", "values", "keys", "all"]


def test_without_both_there_are_no_distances_to_it():
    specs = {c: SPECS[c] for c in ("keys", "values")}
    ds = key_value_substitution(hand_run(specs=specs)[0])
    assert "latent_distance_to_both" not in ds and ds.condition.values.tolist() == ["baseline", "keys", "values"]


def test_mistakes_are_sentences():
    twice = {**SPECS, "all": [{"name": "replace_eos", "side": "k"}]}
    with pytest.raises(InterpError, match=r'side="k", and this run has several: keys, all; name it by key='):
        key_value_substitution(hand_run(specs=twice)[0])
    with pytest.raises(InterpError, match=r'side="v", and this run has none; name it by value=.*ReplaceEOS'):
        key_value_substitution(hand_run(specs={"keys": SPECS["keys"]})[0])
    with pytest.raises(InterpError, match=r"no condition 'kyes'; .*did you mean 'keys'"):
        key_value_substitution(hand_run()[0], key="kyes")
    with pytest.raises(InterpError, match="needs conditions with replace_eos or replace_prompt or replace_tokens"):
        key_value_substitution(changed_run({"x": []}))

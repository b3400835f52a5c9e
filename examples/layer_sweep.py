"""Which cross-attention layers carry the prompt? LocoGen's sweep (arXiv:2405.01008): three neighbours read another prompt.

python examples/layer_sweep.py [number of prompts, default 2] [steps, default 4]
"""

import sys

import interp
from interp.interventions import neighbours
from interp.probes import plot

if __name__ == "__main__":
    n, steps = (int(given) for given in (*sys.argv[1:], *["2", "4"][len(sys.argv) - 1 :]))
    pairs = [{"prompt": a, "target": b} for a, b in interp.scenes.pairs(n)]
    pipe = interp.load("scenes")

    layers = [site.name.removesuffix(":probs") for site in interp.sites(pipe, "*attn2:probs")]
    ds = interp.sweep(pipe, pairs, over={"layers": neighbours(layers, 3)}, intervention=interp.ReplacePrompt("{target}"),
                      metric=["judge:prompt", "judge:target"], steps=steps)  # fmt: skip

    for i, names in enumerate(neighbours(layers, 3)):
        prompt, target = (ds.effect_mean.sel(metric=m).values[i] for m in ds.metric.values)
        low, high = ds.effect_interval.sel(metric="judge:target").values[i]
        where = f"{names[0]} and the next two"
        print(f"{where:<75} judge:prompt {prompt:+.2f}  judge:target {target:+.2f} [{low:+.2f}, {high:+.2f}]")
    print(f"n = {n} pairs of prompts, one seed; brackets: bootstrap 95 % interval over prompts")
    plot(ds.assign_coords(layers=[f"{a + 1}–{a + 3}" for a in range(len(layers) - 2)])).savefig("layer_sweep.png")

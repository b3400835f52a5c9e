"""Where does a corrupted prompt come back? Noise on the subject's tokens, one clean activation restored (arXiv:2310.13730).

python examples/causal_tracing.py [number of prompts, default 3]
"""

import sys

import interp
from interp.probes import plot

if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    colors = ("red", "blue", "green", "yellow")
    table = [{"prompt": f"a large {colors[i % 4]} {shape} on a gray background", "subject": f"{colors[i % 4]} {shape}"}
             for i, shape in zip(range(n), ["circle", "star", "square", "triangle", "heart"] * n, strict=False)]  # fmt: skip
    pipe = interp.load("scenes")
    sites = [
        *(f"text_encoder.encoder.layers.{i}:out" for i in range(len(pipe.text_encoder.encoder.layers))),
        *(f"unet.{block}:out" for block in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1")),
    ]
    kept = interp.Capture(attention=None, sites=[site for site in sites if site.startswith("unet")])
    noise = interp.AddNoise("text_encoder.embeddings:out", scale=3.0, tokens=("{subject}",))

    clean = interp.trace(pipe, table, steps=6, capture=kept)
    ds = interp.sweep(pipe, table, over={"site": sites}, intervention=lambda site: interp.Patch(clean, site),
                      corrupted=[noise], metric=["latent_distance", "judge"], steps=6)  # fmt: skip

    for metric in ds.metric.values:
        was, now = (float(ds[name].sel(metric=metric).mean()) for name in ("clean_value", "corrupted_value"))
        print(f"{metric}: clean {was:.2f}, corrupted {now:.2f}")
    for site in sites:
        recovered, (low, high) = (
            ds[name].sel(site=site, metric="latent_distance").values for name in ("recovered", "recovered_interval")
        )
        print(f"{site:<35} recovered {recovered:.2f} [{low:.2f}, {high:.2f}]")
    print(f"n = {n} prompts, one seed; brackets: bootstrap 95 % interval over prompts")
    plot(ds).savefig("causal_tracing.png")

"""Where in the text encoder does a corrupted subject come back? Clean states restored layer by layer (arXiv:2310.13730).

python examples/causal_tracing.py [number of prompts, default 2] [steps, default 4]
"""

import sys

import interp
from interp.probes import plot

if __name__ == "__main__":
    n, steps = (int(given) for given in (*sys.argv[1:], *["2", "4"][len(sys.argv) - 1 :]))
    subjects = [
        f"{color} {shape}" for shape in ("circle", "star", "square", "heart") for color in ("red", "blue", "green")
    ]
    table = [{"prompt": f"a large {s} on a gray background", "subject": s} for s in subjects[:n]]
    pipe = interp.load("scenes")
    layers = [f"text_encoder.encoder.layers.{i}:out" for i in range(len(pipe.text_encoder.encoder.layers))]
    noise = interp.AddNoise("text_encoder.embeddings:out", scale=3.0, tokens=("{subject}",))

    clean = interp.trace(pipe, table, steps=steps)
    ds = interp.sweep(pipe, table, over={"site": layers, "tokens": [("{subject}",), ("eos", "pad")]}, corrupted=[noise],
                      intervention=lambda site, tokens: interp.Patch(clean, site, tokens=tokens),
                      metric="latent_distance", steps=steps)  # fmt: skip

    print(f"distance of the latents from the clean ones: corrupted {float(ds.corrupted_value.mean()):.2f}")
    for site in ds.site.values:
        for tokens in ds.tokens.values:
            one = ds.sel(site=site, tokens=tokens, metric="latent_distance")
            low, high = one.recovered_interval.values
            print(f"{site}  {tokens:<9}  recovered {float(one.recovered):.2f} [{low:.2f}, {high:.2f}]")
    print(f"n = {n} prompts, one seed; brackets: bootstrap 95 % interval over prompts")
    plot(ds).savefig("causal_tracing.png")

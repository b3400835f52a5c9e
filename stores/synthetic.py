"""`synthetic_run`: a run that looks like a model's, from a few lines of numpy; for tests, examples and
probe authors.
"""

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from interp.stores.create import create_run
from interp.stores.errors import StoreError
from interp.stores.groups import attention_group, images_group, text_group, trajectory_group
from interp.stores.schema import Group, Layout, TokenTable
from interp.stores.writer import RunWriter, to_do

if TYPE_CHECKING:
    from interp.stores.reader import Run

_PROMPTS = (
    "a red circle on a navy background",
    "two small striped triangles",
    "a green hexagon left of a purple star",
    "a cat",
)
_TARGETS = (
    "a blue square on a white background",
    "one large dotted ring",
    "a teal cross above a grey moon",
    "a dog",
)
_LATENT = 16
_CHANNELS = 4
_IMAGE = 64
_LAYERS = 2
_FEATURES = 8
OMITTABLE = ("latents", "noise_pred", "attention", "images", "text")


def synthetic_run(
    samples: int = 2,
    steps: int = 6,
    grids: Sequence[str] = ("8x8",),
    heads: str | int = "mean",
    tokens: str = "prompt",
    conditions: Sequence[str] = ("baseline",),
    branches: Sequence[str] = ("cond",),
    scores: bool = True,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    omit: Collection[str] = (),
) -> "Run":
    """Make a deterministic run of `samples` images in each condition, in memory or at `path`, without a
    model.

    Latents are data_scale·x_0 + noise_scale·ε with smooth x_0; attention sums to 1 over tokens; prompts
    differ in
    length, so that short ones leave token columns unused (role "", NaN). `heads` is `"mean"` or a number of
    heads;
    `tokens="prompt"` sums the padding into one column, `"all"` keeps it apart. `omit` leaves out: latents,
    noise_pred, attention, images, text.

    >>> run = synthetic_run(samples=2, steps=4)
    >>> dict(run.latents.sizes)
    {'sample': 2, 'step': 4, 'channel': 4, 'y': 16, 'x': 16}
    """
    unknown = sorted({*omit} - {*OMITTABLE})
    if unknown or tokens not in ("prompt", "all"):
        raise StoreError(f"a synthetic run cannot omit {unknown} or have tokens={tokens!r}; omit: {OMITTABLE}")
    maker = _Maker(samples, steps, [str(h) for h in range(heads)] if isinstance(heads, int) else ["mean"],
                   tokens, tuple(conditions), tuple(branches), seed)  # fmt: skip
    layout = maker.layout([_size(g) for g in grids], frozenset(omit))
    with create_run(path, layout) as writer:
        for i in to_do(writer.status):
            maker.write(writer, int(i))
    run = writer.run
    if scores:
        run.write_scores(maker.scores())
    return run


def _size(grid: str) -> tuple[int, int]:
    height, _, width = grid.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise StoreError(f"{grid!r} is not a grid; write it as '8x8', height first")
    return int(height), int(width)


class _Maker:
    """Draws a synthetic run; every number depends on the seed and on what it belongs to, not on the order."""

    def __init__(self, samples: int, steps: int, heads: list[str], tokens: str, conditions: tuple[str, ...],
                 branches: tuple[str, ...], seed: int) -> None:  # fmt: skip
        self.steps, self.heads, self.branches, self.seed = steps, heads, branches, seed
        rows = [(condition, p) for condition in conditions for p in range(samples)]
        self.n = len(rows)
        self.condition = [c for c, _ in rows]
        self.prompt_id = [p for _, p in rows]
        self.prompt = [_PROMPTS[p % len(_PROMPTS)] for p in self.prompt_id]
        self.tokens = _token_table(self.prompt, apart=tokens == "all")
        fraction = np.linspace(0.0, 1.0, steps, endpoint=False)
        self.alpha_bar = np.cos((1 - fraction) * 0.48 * np.pi) ** 2
        self.timestep = np.round((1 - fraction) * 999)
        self.sigma = np.sqrt((1 - self.alpha_bar) / self.alpha_bar)

    def layout(self, grids: list[tuple[int, int]], omit: frozenset[str]) -> Layout:
        n = self.n
        groups: dict[str, Group] = {
            "trajectory": trajectory_group(
                n, timestep=self.timestep, sigma=self.sigma, alpha_bar=self.alpha_bar,
                data_scale=np.sqrt(self.alpha_bar), noise_scale=np.sqrt(1 - self.alpha_bar),
                channel=_CHANNELS, y=_LATENT, x=_LATENT,
                noise_pred="noise_pred" not in omit, latents="latents" not in omit,
            )
        }  # fmt: skip
        for grid in grids if "attention" not in omit else ():
            groups[f"attention/{grid[0]}x{grid[1]}"] = attention_group(
                n, kind="cross", grid=grid, layers=[f"unet.blocks.{k}.attn2" for k in range(_LAYERS)],
                heads=self.heads, branches=self.branches, steps=np.arange(self.steps),
                timestep=self.timestep, sigma=self.sigma, tokens=self.tokens,
            )  # fmt: skip
        if "images" not in omit:
            groups["images"] = images_group(n, _IMAGE, _IMAGE)
        if "text" not in omit:
            both = ["cond", "uncond"]
            groups["text/text_encoder"] = text_group(
                n,
                branches=both,
                token=self.tokens.width,
                feature=_FEATURES,
                pooled=_FEATURES,
                tokens=self.tokens,
            )
        columns = {
            "prompt": self.prompt,
            "negative_prompt": [""] * n,
            "seed": [0] * n,
            "condition": self.condition,
            "prompt_id": self.prompt_id,
            "batch": [i // 2 for i in range(n)],
            "target": [_TARGETS[p % len(_TARGETS)] for p in self.prompt_id],
        }
        attrs = {
            "pipeline": {"class": "SyntheticPipeline"},
            "scheduler": {"class": "SyntheticScheduler"},
            "steps": self.steps,
            "guidance_scale": 5.0,
            "size": [_IMAGE, _IMAGE],
            "prediction_type": "epsilon",
            "conditions": {c: [] for c in dict.fromkeys(self.condition)},
            "synthetic_seed": self.seed,
        }
        return Layout(columns, groups, attrs)

    def write(self, writer: RunWriter, i: int) -> None:
        writer.begin(i)
        for name, value in self._values(writer, i).items():
            if name in writer.layout.arrays:
                writer.put(i, name, value)
        writer.commit(i)

    def _values(self, writer: RunWriter, i: int) -> dict[str, np.ndarray]:
        clean = _smooth(self._rng(1, self.prompt_id[i], self.condition[i]), (_CHANNELS, _LATENT, _LATENT))
        noise = self._rng(2, self.prompt_id[i]).standard_normal((_CHANNELS, _LATENT, _LATENT))
        a = self.alpha_bar[:, None, None, None]
        wrong = self._rng(3, i).standard_normal((self.steps, 2, *noise.shape))
        values = {
            "trajectory/latents": np.sqrt(a) * clean + np.sqrt(1 - a) * noise,
            "trajectory/final_latents": clean,
            "trajectory/noise_pred": noise + 0.1 * np.sqrt(a)[:, None] * wrong,
            "trajectory/guidance_scale": np.full(self.steps, 5.0),
            "trajectory/nfe": np.full(2, self.steps),
            "images/image": _picture(clean),
        }
        embedded = self._rng(4, self.prompt_id[i]).standard_normal((2, self.tokens.width, _FEATURES))
        values |= {"text/text_encoder/embeddings": embedded, "text/text_encoder/pooled": embedded[:, -1]}
        for name, array in writer.layout.arrays.items():
            if name.startswith("attention/"):
                values[name] = self._attention(i, array.sample_shape)
        return values

    def _attention(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return probabilities that sum to 1 over the used tokens; a strong BOS, padding weaker, words in
        places.
        """
        rng = self._rng(5, i, f"{shape[-2]}x{shape[-1]}")
        role = self.tokens.role[i]
        base = np.select([role == "bos", role == "word", role == "eos"], [2.5, 0.0, 0.5], 0.2)
        logits = base[:, None, None] + 1.5 * _smooth(rng, shape)
        used = (role != "")[:, None, None]
        weight = np.where(used, np.exp(logits) * np.maximum(self.tokens.count[i], 1)[:, None, None], 0.0)
        return np.where(used, weight / weight.sum(-3, keepdims=True), np.nan)

    def scores(self) -> dict[str, np.ndarray]:
        names = ("clip:prompt", "clip:target", "judge:prompt", "judge:target")
        draws = self._rng(6).uniform(0, 1, (self.n, len(names)))
        lowered = np.where([n.endswith("prompt") for n in names], 0.5 + draws / 2, draws / 2)
        return {name: lowered[:, k].astype("float32") for k, name in enumerate(names)}

    def _rng(self, *key: int | str) -> np.random.Generator:
        numbers = [n for k in key for n in (k.encode() if isinstance(k, str) else [k])]
        return np.random.default_rng([self.seed, *numbers])


def _smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw fields (…, y, x) of unit deviation made of low frequencies."""
    spectrum = np.fft.fft2(rng.standard_normal(shape))
    fy, fx = np.fft.fftfreq(shape[-2])[:, None], np.fft.fftfreq(shape[-1])
    field = np.fft.ifft2(spectrum * np.exp(-(fy**2 + fx**2) / 0.02)).real
    return field / np.maximum(field.std((-2, -1), keepdims=True), 1e-12)


def _picture(clean: np.ndarray) -> np.ndarray:
    """Return an image (height, width, rgb) uint8 showing the first three channels."""
    size = _IMAGE // _LATENT
    large = clean[:3].repeat(size, 1).repeat(size, 2).transpose(1, 2, 0)
    return np.clip(np.rint(127.5 + 60 * large), 0, 255).astype("uint8")


def _pieces(word: str) -> list[str]:
    """Cut long words in two, as tokenizers do."""
    return [word] if len(word) <= 6 else [word[:4], word[4:]]


def _token_table(prompts: list[str], *, apart: bool) -> TokenTable:
    """Return the columns bos, words, eos, padding; the padding summed into one column unless `apart`."""
    full = 20
    lines = []
    for prompt in prompts:
        words = [(piece, k) for k, word in enumerate(prompt.split()) for piece in _pieces(word)]
        line = [("<s>", "bos", -1, 1), *((t, "word", k, 1) for t, k in words), ("</s>", "eos", -1, 1)]
        left = full - len(line)
        line += [("</s>", "pad", -1, 1)] * left if apart else [("</s>", "pad", -1, left)]
        lines.append(line)
    width = max(len(line) for line in lines) if lines else 1
    lines = [line + [("", "", -1, 0)] * (width - len(line)) for line in lines]
    columns = [
        np.array([cell[c] for line in lines for cell in line], "int32" if c > 1 else object).reshape(-1, width)
        for c in range(4)
    ]
    text, role, word, count = columns
    ids = np.array([[sum(t.encode()) % 997 if t else -1 for t in line] for line in text], "int32").reshape(-1, width)
    uncond = np.where(role == "", "", np.where(role == "bos", "<s>", "</s>")).astype(object)
    return TokenTable(text, ids, role, word, count, uncond)

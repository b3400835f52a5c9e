"""`interp.encode_image`: real pictures enter; one recorded forward pass at each chosen noise level."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from interp.autoencoding import to_latents
from interp.capture import Capture, default_capture
from interp.errors import InterpError
from interp.families import find_family
from interp.hooks import DenoiserCall, HookRegistry
from interp.interventions import Intervention, attach_all
from interp.levels import noise_levels
from interp.loading import load
from interp.plan_arguments import Conditions
from interp.planning import Plan, plan
from interp.prompts import prompt_table
from interp.recorder import Recorder
from interp.stores import Run, RunWriter, create_run
from interp.tracing import call_arguments

IMAGE_COLUMN = "image_hash"


def encode_image(
    pipe: Any,
    image: Any,
    timestep: float | Sequence[float],
    *,
    prompt: Any = "",
    seeds: Sequence[int] | int = 0,
    capture: Capture | None = None,
    interventions: Sequence[Intervention] | None = None,
    conditions: Conditions | None = None,
    batch_size: int | Literal["auto"] = "auto",
    options: Mapping[str, Any] | None = None,
    store: str | PathLike[str] | None = None,
    progress: bool = False,
) -> Run:
    """Noise real pictures to chosen levels and record one forward pass at each: no sampling.

    x_t = data_scale·x_0 + noise_scale·ε, with x_0 the autoencoder's mode and one ε a sample for all its levels. The
    pipeline itself makes the denoiser's inputs, so every family that can be traced can be given pictures.

    Args:
        pipe: A diffusers pipeline, or what `interp.load` accepts.
        image: A picture or several of one size: PIL images, uint8 arrays (height, width, 3), one array (n, height,
            width, 3), or tensors (3, height, width) in [0, 1].
        timestep: The scheduler's timestep(s), e.g. 400 or [100, 400, 700] of 1000; they lie along `step`, the noisiest
            first.
        prompt: One text for all pictures, or one a picture: a list or a table, as `interp.trace` takes it. One picture
            may have several prompts.
        seeds: Noise seeds; each picture is a sample for each seed.
        capture: What to keep. Only `capture.branches` are evaluated, so by default the branch with text alone.
        interventions, conditions: As in `interp.trace`.
        batch_size: Pictures that run together.
        options: Further arguments of the pipeline's call.
        store: Path of the run; the same call resumes it. None keeps it in memory.
        progress: Show a progress bar.

    Returns:
        A run as of `interp.trace`, `step` being the noise levels: `latents` holds x_t, `final_latents` x_0, `images`
        the pictures given; the column `prompt_id` numbers pictures.

    Raises:
        InterpError: pictures of different sizes or of a size that the model cannot take, as many prompts as fit no
            pictures, or a timestep outside the schedule.

    >>> import interp, numpy as np
    >>> white = np.full((128, 128, 3), 255, "uint8")
    >>> run = interp.encode_image("scenes", white, [700, 300], prompt="a large white circle")
    >>> run.latents.timestep.values.tolist(), run.attention("16x16").sizes["step"]
    ([700.0, 300.0], 2)
    """
    pipe = load(pipe) if isinstance(pipe, str) else pipe
    pictures = _pictures(image)
    pictures, rows = _paired(pictures, prompt)
    chosen = capture or default_capture(pipe)
    family = find_family(pipe)
    with noise_levels(pipe, timestep) as levels:
        planned = plan(
            pipe, rows, seeds=seeds, steps=len(levels), height=pictures[0].shape[0], width=pictures[0].shape[1],
            capture=chosen, interventions=interventions, conditions=conditions, batch_size=batch_size, options=options,
        )  # fmt: skip
        attrs = {**planned.layout.attrs, "encoded_at": [float(t) for t in levels]}
        planned = replace(planned, layout=replace(planned.layout, attrs=attrs))
        with create_run(store, planned.layout) as writer:
            waiting = [[i for i in batch if writer.status[i] != 1] for batch in planned.batches]
            bar = tqdm(total=len(planned), unit="sample", disable=not progress)
            quiet = dict(getattr(pipe, "_progress_bar_config", {}))
            pipe.set_progress_bar_config(**{**quiet, "disable": True})
            try:
                for batch, left in zip(planned.batches, waiting, strict=True):
                    if left:
                        _run_batch(pipe, family, planned, writer, batch, left, pictures)
                    bar.update(len(batch))
            finally:
                pipe.set_progress_bar_config(**quiet)
                bar.close()
    return writer.run


def _run_batch(
    pipe: Any, family: Any, planned: Plan, writer: RunWriter, batch: list[int], waiting: list[int],
    pictures: list[np.ndarray],
) -> None:  # fmt: skip
    columns = planned.layout.samples
    shown = np.stack([pictures[columns["prompt_id"][i]] for i in batch])
    clean = to_latents(pipe, shown)
    noise = torch.cat(
        [
            torch.randn(1, *clean.shape[1:], generator=torch.Generator("cpu").manual_seed(columns["seed"][i]))
            for i in batch
        ]
    )
    scheduler = pipe.scheduler
    scheduler.pair = (family.pack(clean), family.pack(noise.to(clean.device)))
    scheduler.timeline = planned.timeline
    branches = planned.capture.branches

    def evaluate(call: DenoiserCall) -> None:
        call.keep = tuple(b for b in call.keep if b in branches)

    with HookRegistry(pipe) as hooks:
        changes = planned.conditions[columns["condition"][batch[0]]]
        attach_all(changes, hooks, planned.batch(batch))
        hooks.on_call(evaluate)
        recorder = Recorder(hooks, writer, planned, batch, waiting)
        recorder.begin()
        arguments = call_arguments(pipe, planned, batch)
        noisy = float(planned.timeline.data_scale[0]) * clean + float(planned.timeline.noise_scale[0]) * noise.to(clean)
        noisy = family.given_latents(noisy).to(family.denoiser.dtype)
        pipe(**{**arguments, "output_type": "latent", "latents": noisy})
        recorder.finish(shown if planned.capture.image else None)


def _paired(pictures: list[np.ndarray], prompt: Any) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Give every picture its row of the prompt table."""
    table = prompt_table(prompt)
    count = max(len(pictures), len(table))
    if not {len(pictures), len(table)} <= {1, count}:
        raise InterpError(
            f"{len(pictures)} pictures were given with {len(table)} prompts; give one for all, or one for each"
        )
    pictures = pictures * (count // len(pictures))
    rows = table.rows(list(range(len(table)))) * (count // len(table))
    hashes = [hashlib.sha256(p.tobytes()).hexdigest()[:16] for p in pictures]
    return pictures, [{**row, IMAGE_COLUMN: digest} for row, digest in zip(rows, hashes, strict=True)]


def _pictures(image: Any) -> list[np.ndarray]:
    """Read pictures of any kind as uint8 (height, width, rgb)."""
    many = list(image) if isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4 else [image]
    found = [_picture(one) for one in many]
    if not found:
        raise InterpError("no picture was given")
    sizes = sorted({p.shape[:2] for p in found})
    if len(sizes) > 1:
        raise InterpError(f"pictures of different sizes {sizes} were given (height, width); make them one size")
    return found


def _picture(one: Any) -> np.ndarray:
    if hasattr(one, "convert"):  # PIL
        return np.asarray(one.convert("RGB"))
    if isinstance(one, torch.Tensor) and one.ndim == 3 and one.shape[0] == 3 and one.is_floating_point():
        values = one.detach().float().cpu().permute(1, 2, 0).numpy()
        if values.min() < -1e-3 or values.max() > 1 + 1e-3:
            raise InterpError(
                f"a picture as a tensor holds values in [0, 1], not {values.min():.3g} to {values.max():.3g}"
            )
        return (values.clip(0, 1) * 255).round().astype("uint8")
    values = np.asarray(one.cpu() if isinstance(one, torch.Tensor) else one)
    if values.dtype == np.uint8 and values.ndim == 3 and values.shape[-1] == 3:
        return np.ascontiguousarray(values)
    raise InterpError(
        f"a picture of type {type(one).__name__}, shape {np.shape(values)} and dtype {values.dtype} cannot be read; give PIL "
        "images, uint8 arrays (height, width, 3) or tensors (3, height, width) in [0, 1]"
    )

"""The four phases of training: autoencoder, CLIP, judge, UNet."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.nn import functional as F

from interp.scenes.bpe import BOS, EOS, POSITIONS, vocabulary
from interp.scenes.grammar import WORDS
from interp.scenes.parts import Judge, Sizes, build_clip, build_scheduler, build_unet, build_vae, judge_loss
from interp.scenes.train_data import Artist, stream
from interp.scenes.train_loop import Course, Plan, Pool

REUSE = 4  # how often each scene of the UNet's pool is trained on, on average
EMPTY = 0.1  # the share of captions left out, so that the UNet learns ε(∅)
MIN_SNR = 5.0


def _autocast(plan: Plan) -> Any:
    return torch.autocast(plan.device, torch.bfloat16, enabled=plan.device == "cuda")


def _ready(model: Any, plan: Plan) -> Any:
    return model.to(plan.device, memory_format=torch.channels_last)


def _compiled(plan: Plan, call: Any) -> Any:
    return torch.compile(call) if plan.compiled else call


def saved_vae(folder: Path, device: str) -> Any | None:
    """Return the trained autoencoder, frozen, or None where it is not there yet."""
    from diffusers import AutoencoderKL

    if not (folder / "vae" / "config.json").exists():
        return None
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device, memory_format=torch.channels_last)
    return vae.requires_grad_(False).eval()


def train_vae(plan: Plan, sizes: Sizes) -> None:
    """Train the autoencoder on pictures alone; its scaling factor is measured at the end."""
    torch.manual_seed(plan.seed)
    model = _ready(build_vae(sizes), plan)
    course = Course(model, plan)
    artist = Artist(sizes.pixels, plan.seed * 1000 + course.step, plan.device, plan.compiled)
    batches = stream(plan.batch, 0, (1, plan.seed, course.step), plan.workers, plan.device)

    def differences(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

    def loss_of(images: Tensor, noise: Tensor) -> Tensor:
        with _autocast(plan):
            posterior = model.encode(images).latent_dist
            latents = posterior.mean + posterior.std * noise
            seen = model.decode(latents).sample
        seen = seen.float()
        edges = sum(F.l1_loss(a, b) for a, b in zip(differences(seen), differences(images), strict=True))
        spread = posterior.kl().float().mean() / noise[0].numel()
        return F.l1_loss(seen, images) + 0.5 * F.mse_loss(seen, images) + 0.5 * edges + 2e-4 * spread

    compiled = _compiled(plan, loss_of)
    side = sizes.pixels // 4

    def step(_: int) -> Tensor:
        images = artist(next(batches)).contiguous(memory_format=torch.channels_last)
        return compiled(images, artist.normal(len(images), 4, side, side))

    course.run(step)
    course.average_into(model)
    with torch.no_grad():
        spread = torch.cat([model.encode(artist(next(batches))).latent_dist.mean for _ in range(4)]).std()
    model.register_to_config(scaling_factor=1 / spread.item())
    model.save_pretrained(plan.out / "vae.new")
    shutil.rmtree(plan.out / "vae", ignore_errors=True)
    (plan.out / "vae.new").rename(plan.out / "vae")  # at once: other phases watch for it


def _degraded(plan: Plan, artist: Artist) -> Callable[[int, Tensor], Tensor]:
    """Return step, pictures → pictures as the judges must also know them; looks for the autoencoder now and then."""
    found: list[Any] = [None]

    @torch.no_grad()
    def degrade(step: int, images: Tensor) -> Tensor:
        if found[0] is None and step % 100 == 0:
            found[0] = saved_vae(plan.out, plan.device) or saved_vae(plan.out.parent, plan.device)
        with _autocast(plan):
            return artist.degrade(images, found[0]).float()

    return degrade


def train_clip(plan: Plan, sizes: Sizes) -> None:
    """Train CLIP: pictures against captions, and each picture against a caption that is wrong in one thing.

    The wrong captions (Yuksekgonul et al., arXiv 2210.01936) keep it from reading captions as bags of words.
    """
    torch.manual_seed(plan.seed)
    model = build_clip(sizes).to(plan.device)
    course = Course(model, plan)
    artist = Artist(sizes.pixels, plan.seed * 1000 + 1 + course.step, plan.device, plan.compiled)
    batches = stream(
        plan.batch, 1, (2, plan.seed, course.step), plan.workers, plan.device, wrong=plan.negatives, plain=plan.plain
    )
    degrade = _degraded(plan, artist)
    end = vocabulary(WORDS)[0][EOS]

    def pooled(text: Any, ids: Tensor) -> Tensor:
        if sizes.pooling == "eos":
            return text.pooler_output
        words = ((ids != end).int().cumprod(-1) * (torch.arange(ids.shape[1], device=ids.device) > 0))[..., None]
        return (text.last_hidden_state * words).sum(1) / words.sum(1)

    def loss_of(images: Tensor, ids: Tensor) -> Tensor:
        with _autocast(plan):
            seen = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
            said = model.text_projection(pooled(model.text_model(input_ids=ids), ids))
        seen, said = F.normalize(seen.float(), dim=-1), F.normalize(said.float(), dim=-1)
        logits = seen @ said.T * model.logit_scale.exp()
        target = torch.arange(len(seen), device=seen.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(seen)].T, target)) / 2

    compiled = _compiled(plan, loss_of)

    def step(i: int) -> Tensor:
        batch = next(batches)
        images = degrade(i, artist(batch))
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        said = [batch["ids"][:, 0], *([batch["wrong"]] if plan.negatives else [])]
        return compiled(images, torch.cat(said).long())

    course.run(step)
    course.average_into(model)
    model.save_pretrained(plan.out / "clip")


def train_judge(plan: Plan, sizes: Sizes) -> None:
    """Train the judge to answer every question about pictures, clean and degraded."""
    torch.manual_seed(plan.seed + 77)
    model = _ready(Judge(sizes), plan)
    course = Course(model, plan)
    artist = Artist(sizes.pixels, plan.seed * 1000 + 2 + course.step, plan.device, plan.compiled)
    batches = stream(plan.batch, 0, (3, plan.seed, course.step), plan.workers, plan.device)
    degrade = _degraded(plan, artist)

    def loss_of(images: Tensor, draft: dict[str, Tensor]) -> Tensor:
        with _autocast(plan):
            answers = model(images)
        return judge_loss({name: value.float() for name, value in answers.items()}, draft)

    compiled = _compiled(plan, loss_of)

    def step(i: int) -> Tensor:
        batch = next(batches)
        images = degrade(i, artist(batch))
        light = 1 + 0.15 * (torch.rand(len(images), 1, 1, 1, generator=artist.generator, device=plan.device) - 0.5)
        return compiled((images * light).contiguous(memory_format=torch.channels_last), batch)

    course.run(step)
    course.average_into(model)
    (plan.out / "judge").mkdir(exist_ok=True)
    save_model(model.to(memory_format=torch.contiguous_format), str(plan.out / "judge" / "model.safetensors"))


def train_unet(plan: Plan, sizes: Sizes) -> None:
    """Train the UNet to predict noise in the autoencoder's latents under the frozen text encoder."""
    from transformers import CLIPModel

    torch.manual_seed(plan.seed)
    vae = saved_vae(plan.out, plan.device) or saved_vae(plan.out.parent, plan.device)
    if vae is None:
        raise SystemExit(f"{plan.out} has no vae/: run the phase vae first")
    text = CLIPModel.from_pretrained(plan.out / "clip").text_model.to(plan.device).requires_grad_(False)
    model = _ready(build_unet(sizes), plan)
    course = Course(model, plan)
    artist = Artist(sizes.pixels, plan.seed * 1000 + 3 + course.step, plan.device, plan.compiled)
    batches = stream(plan.batch, REUSE, (4, plan.seed, course.step), plan.workers, plan.device, plain=plan.plain)
    alphas = build_scheduler().alphas_cumprod.to(plan.device)
    ids_of, _ = vocabulary(WORDS)
    empty = torch.tensor([ids_of[BOS], *[ids_of[EOS]] * (POSITIONS - 1)], device=plan.device)
    pool = Pool(64 * plan.batch)

    @torch.no_grad()
    def latents_of(images: Tensor) -> Tensor:
        return vae.encode(images).latent_dist.mean * vae.config.scaling_factor

    def loss_of(clean: Tensor, ids: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        alpha = alphas[times]
        a = alpha[:, None, None, None]
        with _autocast(plan):
            with torch.no_grad():
                embedding = text(input_ids=ids).last_hidden_state
            guess = model(a.sqrt() * clean + (1 - a).sqrt() * noise, times, embedding).sample
        snr = alpha / (1 - alpha)
        return ((guess.float() - noise).square().mean((1, 2, 3)) * snr.clamp(max=MIN_SNR) / snr).mean()

    encode, compiled = _compiled(plan, latents_of), _compiled(plan, loss_of)
    generator = artist.generator

    def refill() -> None:
        batch = next(batches)
        with _autocast(plan):
            clean = encode(artist(batch).contiguous(memory_format=torch.channels_last))
        pool.add(clean=clean.to(torch.float16), ids=batch["ids"])

    def step(i: int) -> Tensor:
        if i % REUSE == 0 or not pool.filled:
            for _ in range(8 if not pool.filled else 1):
                refill()
        clean, told = pool.draw(plan.batch, generator)
        which = torch.randint(REUSE, (len(told),), generator=generator, device=plan.device)
        said = told[torch.arange(len(told), device=plan.device), which].long()
        ids = empty.expand(len(said), -1).clone()
        ids[:, : said.shape[1]] = said
        silent = torch.rand(len(ids), 1, generator=generator, device=plan.device) < EMPTY
        ids = torch.where(silent, empty, ids)
        times = torch.randint(1000, (len(ids),), generator=generator, device=plan.device)
        return compiled(clean.float(), ids, artist.normal(*clean.shape), times)

    course.run(step)
    course.average_into(model)
    model.to(memory_format=torch.contiguous_format).save_pretrained(plan.out / "unet")


PHASES: dict[str, Callable[[Plan, Sizes], None]] = {
    "vae": train_vae,
    "clip": train_clip,
    "judge": train_judge,
    "unet": train_unet,
}

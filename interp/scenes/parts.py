"""The parts of the model organism, by size: CLIP, autoencoder, UNet, scheduler, and the judge."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.scenes.bpe import BOS, EOS, POSITIONS, vocabulary
from interp.scenes.grammar import BACKGROUNDS, COLORS, PATTERNS, SHAPES, SIZES, WORDS


@dataclass(frozen=True)
class Sizes:
    """How large each part is. `text_layers` is the recipe's main choice (docs/scenes.md)."""

    pixels: int = 128
    text_layers: int = 4
    text_width: int = 128
    pooling: str = "eos"  # what CLIP compares with pictures: the state of the first EOS, or the mean of the "words"
    vision_layers: int = 5
    vision_width: int = 160
    projection: int = 128
    vae: tuple[int, ...] = (32, 64, 128)
    unet: tuple[int, ...] = (64, 128, 192)
    judge: tuple[int, ...] = (32, 64, 96, 128)


FULL = Sizes()
SMOKE = Sizes(
    pixels=32,
    text_layers=2,
    text_width=32,
    vision_layers=1,
    vision_width=32,
    projection=32,
    vae=(16, 16, 16),
    unet=(16, 16, 16),
    judge=(8, 8, 8, 8),
)


def build_clip(sizes: Sizes) -> Any:
    """Return a CLIPModel with fresh weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    ids, _ = vocabulary(WORDS)
    text = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=sizes.text_width,
        intermediate_size=4 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        projection_dim=sizes.projection,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[EOS],
    )
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_width // 32,
        image_size=sizes.pixels,
        patch_size=sizes.pixels // 8,
        projection_dim=sizes.projection,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.projection))


def build_vae(sizes: Sizes) -> Any:
    """Return an AutoencoderKL with fresh weights: pictures to four channels at a quarter of the resolution."""
    from diffusers import AutoencoderKL

    levels = len(sizes.vae)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=sizes.pixels,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet(sizes: Sizes) -> Any:
    """Return a UNet2DConditionModel with fresh weights: cross-attention at every resolution."""
    from diffusers import UNet2DConditionModel

    levels = len(sizes.unet)
    return UNet2DConditionModel(
        sample_size=sizes.pixels // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=sizes.unet,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    """Return the DDIM scheduler of Stable Diffusion 1.x."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# What the judge answers: per picture, and per object.
PICTURE_ANSWERS = {"two": 2, "stacked": 2, "background": len(BACKGROUNDS)}
OBJECT_ANSWERS = {"shape": len(SHAPES), "color": len(COLORS), "pattern": len(PATTERNS), "size": len(SIZES), "place": 2}


class Residual(nn.Module):
    """Halve the resolution, then add what two convolutions find."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inside, outside, 3, stride=2, padding=1)
        self.body = nn.Sequential(
            nn.GroupNorm(8, outside),
            nn.SiLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.GroupNorm(8, outside),
            nn.SiLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inside, y, x) → (n, outside, y/2, x/2)."""
        x = self.down(x)
        return x + self.body(x)


class Judge(nn.Module):
    """A small convolutional network that says what a picture shows; it shares no weights with the generator.

    Pictures (n, rgb, y, x) in [−1, 1] → logits by name: those of PICTURE_ANSWERS (n, answer), and those of
    OBJECT_ANSWERS (n, object, answer), the objects from left to right or, if stacked, from top to bottom.
    `place` is no logit but the object's centre (x, y) in half widths from the middle.
    """

    def __init__(self, sizes: Sizes = FULL) -> None:
        super().__init__()
        widths = (3, *sizes.judge)
        self.trunk = nn.Sequential(*(Residual(a, b) for a, b in itertools.pairwise(widths)))
        side = sizes.pixels // 2 ** len(sizes.judge)
        self.squeeze = nn.Sequential(nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 24, 1))
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(24 * side * side, 192), nn.SiLU())
        self.picture = nn.Linear(192, sum(PICTURE_ANSWERS.values()))
        self.objects = nn.Linear(192, 2 * sum(OBJECT_ANSWERS.values()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Answer every question about every picture."""
        h = self.hidden(self.squeeze(self.trunk(images)))
        answers = self.picture(h).split(list(PICTURE_ANSWERS.values()), -1)
        each = self.objects(h).view(len(images), 2, -1).split(list(OBJECT_ANSWERS.values()), -1)
        return dict(zip([*PICTURE_ANSWERS, *OBJECT_ANSWERS], [*answers, *each], strict=True))


def judge_loss(answers: dict[str, Tensor], draft: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of all questions, plus the squared error of the places."""
    two, relation = draft["two"], draft["relation"]
    # Left to right, top to bottom: a scene drawn as "right of" or "below" has its second object first.
    order = torch.where(two & (relation % 2 == 1), 1, 0)[:, None]
    order = torch.cat([order, 1 - order], 1)
    there = torch.stack([torch.ones_like(two), two], 1).float()
    entropy = nn.functional.cross_entropy
    total = entropy(answers["two"], two.long()) + entropy(answers["background"], draft["background"])
    stacked = entropy(answers["stacked"], (relation >= 2).long(), reduction="none")
    total = total + (stacked * two).sum() / two.sum().clamp(min=1)
    for name in ("shape", "color", "pattern", "size"):
        target = draft[name].gather(1, order)
        loss = entropy(answers[name].flatten(0, 1), target.flatten(), reduction="none")
        total = total + (loss * there.flatten()).sum() / there.sum()
    centre = draft["centre"].gather(1, order[:, :, None].expand(-1, -1, 2))
    error = (answers["place"] - centre).square().mean(-1)
    return total + 4 * (error * there).sum() / there.sum()


def parameters(model: nn.Module) -> int:
    """Return the number of weights of a model."""
    return sum(p.numel() for p in model.parameters())

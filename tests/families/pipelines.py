"""Tiny random pipelines built from configs: every layout that the families must handle, in well under a second."""

from functools import lru_cache

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ["a", "the", "on", "of", "and", "red", "blue", "green", "circle", "square", "background", "cat", "dog", "photo"]


def _bytes_to_unicode() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP BPE tokenizer: the words above are one token each, all others fall apart into letters.

    'background' stays two tokens ('back', 'ground'), so that word merging is exercised.
    """
    letters = _bytes_to_unicode()
    vocab = {c: i for i, c in enumerate(letters + [c + "</w>" for c in letters])}
    merges = []
    for word in [*WORDS, "back", "ground"]:
        if word == "background":
            continue
        parts = [*word[:-1], word[-1] + ("" if word == "back" else "</w>")]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
            parts = ["".join(pair), *parts[2:]]
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token=pad,
        model_max_length=77,
    )


def _text_config(tok: CLIPTokenizer, width: int, projection: int | None = None) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        projection_dim=projection or width,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def _unet(**changes: object) -> UNet2DConditionModel:
    config: dict = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    unet = UNet2DConditionModel(**{**config, **changes})
    with torch.no_grad():  # peaky attention: random weights give nearly uniform maps, on which nothing can fail
        for name, p in unet.named_parameters():
            if name.endswith("to_q.weight"):
                p.mul_(6)
    return unet


_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sd1() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: ε-prediction, padding with EOS."""
    torch.manual_seed(0)
    tok = tokenizer()
    return _sd(tok, DDIMScheduler(**_SCHEDULE, clip_sample=False, set_alpha_to_one=False))


def sd2() -> StableDiffusionPipeline:
    """Stable Diffusion 2.x: v-prediction, padding with '!'."""
    torch.manual_seed(0)
    tok = tokenizer(pad="!")
    scheduler = DDIMScheduler(**_SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    return _sd(tok, scheduler, use_linear_projection=True, attention_head_dim=(2, 4))


def _sd(tok: CLIPTokenizer, scheduler: object, **unet: object) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tok, 32)),
        tokenizer=tok,
        unet=_unet(**unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders, pooled embeddings, added conditions, Euler."""
    torch.manual_seed(0)
    tok, tok2 = tokenizer(), tokenizer(pad="!")
    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tok, 32)),
        tokenizer=tok,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tok2, 32, projection=32)),
        tokenizer_2=tok2,
        unet=_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
        ),
        scheduler=EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


BUILDERS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}


@lru_cache
def tiny(name: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Build a tiny pipeline once a process; tests must leave it as they found it, which they check."""
    return BUILDERS[name]()

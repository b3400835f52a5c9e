"""Tiny random pipelines built from configs: every layout that the families must handle, in well under a second."""

from functools import lru_cache

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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


def _vae(blocks: tuple[int, ...] = (8, 16)) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=["DownEncoderBlock2D"] * len(blocks),
        up_block_types=["UpDecoderBlock2D"] * len(blocks),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def _unet(**changes: object) -> UNet2DConditionModel:
    config: dict = {
        "sample_size": 8,
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


def t5_tokenizer() -> T5Tokenizer:
    """A T5 unigram tokenizer with the same words; 'background' is two tokens again, and letters spell the rest."""
    words = [f"▁{w}" for w in [*WORDS, "back"] if w != "background"]
    letters = [chr(c) for c in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((w, -3.0) for w in [*words, "ground"])]
    return T5Tokenizer(vocab=[*pieces, *((c, -9.0) for c in letters)], extra_ids=0, model_max_length=512)


def t5(tok: T5Tokenizer, width: int = 32) -> T5EncoderModel:
    """A two-layer T5 encoder."""
    config = T5Config(vocab_size=len(tok), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


@torch.no_grad()
def _peaky(transformer: torch.nn.Module, factor: float) -> None:
    """Make attention peaky: queries are scaled, after their norm if they have one."""
    for name, module in transformer.named_modules():
        for part in ("to_q", "add_q_proj", "norm_q", "norm_added_q"):
            found = getattr(module, part, None)
            normed = getattr(module, "norm_q", None) is not None
            if isinstance(found, torch.nn.Module) and part.startswith("norm") == normed:
                assert found.weight is not None, name
                found.weight.mul_(factor)


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pixart(cls: type, **changes: object) -> PixArtAlphaPipeline:
    torch.manual_seed(0)
    tok = t5_tokenizer()
    config: dict = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "cross_attention_dim": 16, "sample_size": 16, "patch_size": 2, "caption_channels": 32, "norm_type": "ada_norm_single",
    }  # fmt: skip
    transformer = PixArtTransformer2DModel(**{**config, **changes})
    _peaky(transformer, 8)
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return _quiet(cls(tokenizer=tok, text_encoder=t5(tok), vae=_vae(), transformer=transformer, scheduler=scheduler))


def pixart_alpha() -> PixArtAlphaPipeline:
    """PixArt-α: masked T5 states, learned variance, DPM-Solver++; at 1024 also told size and shape."""
    return _pixart(PixArtAlphaPipeline)


def pixart_sigma() -> PixArtSigmaPipeline:
    """PixArt-Σ: 300 tokens."""
    return _pixart(PixArtSigmaPipeline)


def _sd3(**changes: object) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tok, tok2, tok3 = tokenizer(), tokenizer(pad="!"), t5_tokenizer()
    config: dict = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 64, "caption_projection_dim": 16,
        "pooled_projection_dim": 64, "pos_embed_max_size": 32,
    }  # fmt: skip
    transformer = SD3Transformer2DModel(**{**config, **changes})
    _peaky(transformer, 8)
    vae = _vae()
    vae.register_to_config(shift_factor=0.05)
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=CLIPTextModelWithProjection(_text_config(tok, 32, projection=32)),
            tokenizer=tok,
            text_encoder_2=CLIPTextModelWithProjection(_text_config(tok2, 32, projection=32)),
            tokenizer_2=tok2,
            text_encoder_3=t5(tok3, 64),
            tokenizer_3=tok3,
        )
    )


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: three text encoders, joint attention, flow matching."""
    return _sd3()


def sd35() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: query and key norms, and self-attention beside the joint one."""
    return _sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def _flux(**changes: object) -> FluxPipeline:
    torch.manual_seed(0)
    tok, tok2 = tokenizer(), t5_tokenizer()
    config: dict = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    transformer = FluxTransformer2DModel(**{**config, **changes})
    _peaky(transformer, 4)
    vae = _vae()
    vae.register_to_config(shift_factor=0.05)
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tok, 32)),
        tokenizer=tok,
        text_encoder_2=t5(tok2),
        tokenizer_2=tok2,
    )
    pipe.default_sample_size = 16
    return _quiet(pipe)


def flux() -> FluxPipeline:
    """FLUX.1 [dev]: two- and one-stream blocks, rotary embedding, guidance as an input of the model."""
    return _flux(guidance_embeds=True)


def flux_schnell() -> FluxPipeline:
    """FLUX.1 [schnell]: no guidance input, evenly spaced noise levels."""
    pipe = _flux(guidance_embeds=False)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipe


from tests.families import chat_pipelines as chat  # noqa: E402 - they are built from what is above
from tests.families import dit_pipelines as dit  # noqa: E402

BUILDERS = {
    "sd1": sd1, "sd2": sd2, "sdxl": sdxl, "pixart_alpha": pixart_alpha, "pixart_sigma": pixart_sigma, "sd3": sd3,
    "sd35": sd35, "flux": flux, "flux_schnell": flux_schnell, "flux2": chat.flux2, "flux2_klein": chat.flux2_klein,
    "qwenimage": chat.qwenimage, "zimage": chat.zimage, "sana": dit.sana, "hunyuandit": dit.hunyuandit,
    "auraflow": dit.auraflow,
}  # fmt: skip


@lru_cache
def tiny(name: str):
    """Build a tiny pipeline once a process; tests must leave it as they found it, which they check."""
    return BUILDERS[name]()

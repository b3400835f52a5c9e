"""Tiny pipelines whose text encoder is a language model with a chat template; import them from `pipelines`."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.families import pipelines as base

QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[SYS]{{ m.content[0].text }}[/SYS]{% else %}"
    "[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def tokenizer(template: str, special: list[str], eos: str, bos: str | None = None) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer: the words are one token each after a space, others fall apart into letters."""
    vocab = {c: i for i, c in enumerate(base._bytes_to_unicode())}
    merges: list[tuple[str, str]] = []
    for word in [*base.WORDS, "back", "ground", "system", "user", "assistant", "think"]:
        if word == "background":
            continue
        parts = list(word)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
        if word != "ground":
            merges.append(("Ġ", word))
    merges = list(dict.fromkeys(merges))
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    made = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token=eos, pad_token="<|endoftext|>", bos_token=bos)
    made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = template
    return made


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Of Qwen2.5 and Qwen3: `<|im_end|>` ends a turn."""
    return tokenizer(QWEN, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], "<|im_end|>")


_LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def _flux2_parts(guidance: bool) -> dict:
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance, timestep_guidance_channels=32,
    )  # fmt: skip
    base._peaky(transformer, 4)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    ).eval()  # fmt: skip
    torch.nn.init.uniform_(vae.bn.running_mean, -0.5, 0.5)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return {"transformer": transformer.eval(), "vae": vae, "scheduler": _scheduler()}


def flux2() -> Flux2Pipeline:
    """FLUX.2 [dev]: fused one-stream blocks, guidance as an input of the model, three layers of Mistral."""
    torch.manual_seed(0)
    tok = tokenizer(MISTRAL, ["[SYS]", "[/SYS]", "[INST]", "[/INST]", "</s>"], "</s>", "<s>")
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": len(tok), **_LANGUAGE},
        vision_config={"model_type": "pixtral", **_VISION, "patch_size": 14},
    )
    pipe = Flux2Pipeline(
        text_encoder=Mistral3ForConditionalGeneration(config).eval(), tokenizer=tok, **_flux2_parts(guidance=True)
    )
    pipe.default_sample_size, pipe.system_message = 16, "a photo of the dog"
    return base._quiet(pipe)


def flux2_klein() -> Flux2KleinPipeline:
    """FLUX.2 [klein] base: guidance, three layers of Qwen3."""
    torch.manual_seed(0)
    tok = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tok), **_LANGUAGE)).eval()
    pipe = Flux2KleinPipeline(text_encoder=encoder, tokenizer=tok, **_flux2_parts(guidance=False))
    pipe.default_sample_size = 16
    return base._quiet(pipe)


def qwenimage() -> QwenImagePipeline:
    """Qwen-Image: masks, guidance with rescaled norm, Qwen2.5-VL."""
    torch.manual_seed(0)
    tok = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "model_type": "qwen2_5_vl_text", "vocab_size": len(tok), **_LANGUAGE,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32},
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    base._peaky(transformer, 4)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    ).eval()  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    pipe = QwenImagePipeline(
        transformer=transformer, vae=vae, text_encoder=encoder, tokenizer=tok, scheduler=_scheduler()
    )
    pipe.default_sample_size = 16
    pipe.prompt_template_encode = (
        "<|im_start|>system\na photo of the dog<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    start = pipe.prompt_template_encode.split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(tok(start)["input_ids"])
    return base._quiet(pipe)


def zimage() -> ZImagePipeline:
    """Z-Image: one stream, padding to multiples of 32, negated flow, Qwen3."""
    torch.manual_seed(0)
    tok = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[128, 64, 64],
    ).eval()  # fmt: skip
    base._peaky(transformer, 4)
    for block in transformer.context_refiner:  # the caption's tokens read each other, but each stays itself above all
        torch.nn.init.constant_(block.attention_norm2.weight, 0.1)
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    vae = base._vae()
    vae.register_to_config(shift_factor=0.05)
    pipe = ZImagePipeline(
        transformer=transformer, vae=vae, text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tok), **_LANGUAGE)).eval(),
        tokenizer=tok, scheduler=_scheduler(),
    )  # fmt: skip
    return base._quiet(pipe)

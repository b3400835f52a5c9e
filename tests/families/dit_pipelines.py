"""Tiny pipelines of diffusion transformers with other text encoders; import them from `pipelines`."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.families import pipelines as base


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer with the same words and no end-of-text token; 'background' is two tokens, letters spell the rest."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {piece: i for i, piece in enumerate([*specials, "▁", "\n", *map(chr, range(33, 127))])}
    merges: list[tuple[str, str]] = []
    for word in [*base.WORDS, "ground"]:
        begun, *rest = word[:4] if word == "background" else word
        for letter in rest:
            merges.append((begun, letter))
            begun += letter
        merges.append(("▁", begun))
    for one in merges:
        vocab.setdefault("".join(one), len(vocab))
    tok = GemmaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=512)
    tok._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    return tok


def sana() -> SanaPipeline:
    """Sana: linear self-attention, masked states of a language model that is given an instruction, flow DPM-Solver++."""
    torch.manual_seed(0)
    tok = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, patch_size=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32, sample_size=16,
    )  # fmt: skip
    base._peaky(transformer, 8)
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4, encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4,
        scaling_factor=0.4,
    )  # fmt: skip
    encoder = Gemma2Config(
        vocab_size=len(tok), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return base._quiet(
        SanaPipeline(
            tokenizer=tok,
            text_encoder=Gemma2Model(encoder).eval(),
            vae=vae.eval(),
            transformer=transformer,
            scheduler=scheduler,
        )
    )


def bert_tokenizer() -> BertTokenizer:
    """A BERT tokenizer with the same words; 'background' is two tokens, letters spell the rest."""
    specials, letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], [chr(c) for c in range(33, 127)]
    pieces = [*specials, *(w for w in [*base.WORDS, "back"] if w != "background"), "##ground"]
    pieces = list(dict.fromkeys([*pieces, *letters, *(f"##{c}" for c in letters)]))
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=77)


def hunyuandit() -> HunyuanDiTPipeline:
    """HunyuanDiT: BERT's and T5's masked states, rotary embedding of queries, learned variance, v-prediction, DDPM."""
    torch.manual_seed(0)
    tok, tok2 = bert_tokenizer(), base.t5_tokenizer()
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, hidden_size=16, num_layers=4,
        cross_attention_dim=24, cross_attention_dim_t5=32, pooled_projection_dim=16, sample_size=8,
    )  # fmt: skip
    base._peaky(transformer, 3)
    encoder = BertConfig(
        vocab_size=len(tok), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=77,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    return base._quiet(
        HunyuanDiTPipeline(
            vae=base._vae((8, 8, 8, 8)), text_encoder=BertModel(encoder).eval(), tokenizer=tok, transformer=transformer,
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            text_encoder_2=base.t5(tok2), tokenizer_2=tok2,
        )
    )  # fmt: skip


def auraflow() -> AuraFlowPipeline:
    """AuraFlow: registers before the text, two- and one-stream blocks, flow matching."""
    torch.manual_seed(0)
    tok = base.t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, out_channels=4, pos_embed_max_size=256,
    )  # fmt: skip
    for block, sharper in ((transformer.joint_transformer_blocks[0], 3), (transformer.single_transformer_blocks[0], 5)):
        block.attn.scale *= sharper  # peaky: queries and keys are normed, without weights
    with torch.no_grad():  # so that attention, and with it the text, makes a difference
        for name, parameter in transformer.named_parameters():
            parameter.mul_(4 if "norm1" in name or "time_step_proj" in name else 1)
    encoder = UMT5Config(vocab_size=len(tok), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return base._quiet(
        AuraFlowPipeline(
            tokenizer=tok, text_encoder=UMT5EncoderModel(encoder).eval(), vae=base._vae(), transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )  # fmt: skip


def cogview4() -> CogView4Pipeline:
    """CogView4, which no family describes: a call per branch, named by `cache_context`, and noise levels of its own."""
    torch.manual_seed(0)
    tok = gemma_tokenizer()
    transformer = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32,
        time_embed_dim=8, condition_dim=4, sample_size=16,
    )  # fmt: skip
    encoder = GlmConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    return base._quiet(
        CogView4Pipeline(
            tokenizer=tok,
            text_encoder=GlmModel(encoder).eval(),
            vae=base._vae(),
            transformer=transformer,
            scheduler=scheduler,
        )
    )

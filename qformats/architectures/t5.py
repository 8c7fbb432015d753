"""T5, T5 v1.1, Flan-T5 and mT5: an encoder and a decoder, relative positions by buckets, a unigram vocabulary.

Facts: llama.cpp, ``conversion/t5.py`` ``T5Model`` and ``src/models/t5.cpp``; config defaults: transformers 5,
``models/t5/configuration_t5.py``. The first T5 multiplies what its decoder gives by 1 / √d_model, later ones do not; llama.cpp never
does, so that factor goes into the weights of the last norm, and a model out of a GGUF has none of its own. UMT5, with positions in
every block, is another family, and llama.cpp loads no decoder that is deeper than its encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import HEAD_SIZES, Field, positive
from qformats.architectures.mapping import Rule
from qformats.errors import Unsupported

__all__ = ["T5"]

ENCODER, DECODER = "encoder.block.{i}.layer.", "decoder.block.{i}.layer."
_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias"


def _attention(hf: str, gguf: str, until: str) -> tuple[Rule, ...]:
    return (
        Rule(hf + ".q", gguf + "_q", "QH", until=until), Rule(hf + ".k", gguf + "_k", "QH", until=until),
        Rule(hf + ".v", gguf + "_v", "QH", until=until), Rule(hf + ".o", gguf + "_o", "HQ", until=until),
    )  # fmt: skip


def _feed_forward(hf: str, gguf: str, until: str) -> tuple[Rule, ...]:
    dense = hf + ".DenseReluDense."
    return (
        Rule(dense + "wi_0", gguf + "ffn_gate", "FH", when="is_gated_act", until=until),
        Rule(dense + "wi_1", gguf + "ffn_up", "FH", when="is_gated_act", until=until),
        Rule(dense + "wi", gguf + "ffn_up", "FH", unless="is_gated_act", until=until),
        Rule(dense + "wo", gguf + "ffn_down", "HF", until=until),
        Rule(hf + ".layer_norm", gguf + "ffn_norm", "H", "norm", until=until),
    )


def _derive(full: dict[str, Any]) -> None:
    """The activation in two words, the decoder's depth, and what its last norm is multiplied by."""
    kind = str(full["feed_forward_proj"])
    full["is_gated_act"] = kind.startswith("gated-")
    full.setdefault("num_decoder_layers", full.get("num_hidden_layers"))
    if positive(full, "num_decoder_layers") > positive(full, "num_hidden_layers"):
        raise Unsupported("config-value", "the decoder has more layers than the encoder; llama.cpp does not load such a 't5'")
    scaled = full.get("scale_decoder_outputs", full["tie_word_embeddings"])  # transformers 4 only has the latter
    full["output_factor"] = positive(full, "hidden_size") ** -0.5 if scaled else 1.0


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    config["feed_forward_proj"] = "gated-gelu" if config.pop("is_gated_act") else "relu"
    config["scale_decoder_outputs"] = False
    del config["rope_parameters"]


def _letters(full: Mapping[str, Any]) -> dict[str, int]:
    return {"B": positive(full, "relative_attention_num_buckets"), "M": positive(full, "num_decoder_layers")}


T5 = Architecture(
    name="t5",
    gguf="t5",
    hf_classes=("T5ForConditionalGeneration", "T5WithLMHeadModel", "MT5ForConditionalGeneration"),
    model_types=("t5", "mt5"),
    rules=(
        Rule("shared", "token_embd", "TH", "embedding", copies=("encoder.embed_tokens", "decoder.embed_tokens")),
        Rule(_BIAS.format("encoder"), "enc.blk.0.attn_rel_b", "BA", "positions"),
        Rule(_BIAS.format("decoder"), "dec.blk.0.attn_rel_b", "BA", "positions"),
        *_attention(ENCODER + "0.SelfAttention", "enc.blk.{i}.attn", "L"),
        Rule(ENCODER + "0.layer_norm", "enc.blk.{i}.attn_norm", "H", "norm"),
        *_feed_forward(ENCODER + "1", "enc.blk.{i}.", "L"),
        *_attention(DECODER + "0.SelfAttention", "dec.blk.{i}.attn", "M"),
        Rule(DECODER + "0.layer_norm", "dec.blk.{i}.attn_norm", "H", "norm", until="M"),
        *_attention(DECODER + "1.EncDecAttention", "dec.blk.{i}.cross_attn", "M"),
        Rule(DECODER + "1.layer_norm", "dec.blk.{i}.cross_attn_norm", "H", "norm", until="M"),
        *_feed_forward(DECODER + "2", "dec.blk.{i}.", "M"),
        Rule("encoder.final_layer_norm", "enc.output_norm", "H", "norm"),
        Rule("decoder.final_layer_norm", "dec.output_norm", "H", "norm", factor="output_factor"),
        Rule("lm_head", "output", "TH", "output", optional=True),
    ),
    before=(
        Field("context_length", "u32", "max_position_embeddings"), Field("embedding_length", "u32", "hidden_size"),
        Field("feed_forward_length", "u32", "intermediate_size"), Field("block_count", "u32", "num_hidden_layers"),
        Field("decoder_block_count", "u32", "num_decoder_layers"), Field("attention.head_count", "u32", "num_attention_heads"),
        *HEAD_SIZES, Field("attention.layer_norm_epsilon", "f32", "layer_norm_epsilon"),
        Field("attention.relative_buckets_count", "u32", "relative_attention_num_buckets"),
        Field("attention.layer_norm_rms_epsilon", "f32", "layer_norm_epsilon"),
        Field("decoder_start_token_id", "u32", "decoder_start_token_id"),
    ),
    after=(),
    defaults={
        "hidden_size": 512, "head_dim": 64, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8,
        "max_position_embeddings": 512, "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32, "feed_forward_proj": "relu",
        "tie_word_embeddings": True, "decoder_start_token_id": 0, "rope_theta": 10000.0, "vocab_size": 32128,
    },
    rebuilt={"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
    fixed={
        "feed_forward_proj": ("relu", "gated-gelu"), "relative_attention_max_distance": (128,),
    },
    names={
        "hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "intermediate_size": "d_ff",
        "head_dim": "d_kv", "max_position_embeddings": "n_positions",
    },
    plain_rope=False,
    complete=_derive,
    adjust=_rebuild,
    letters=_letters,
)  # fmt: skip

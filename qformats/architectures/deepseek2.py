"""DeepSeek V2 and V3: latent attention, whose ``kv_b_proj`` is two GGUF tensors, dense blocks first, shared and routed experts.

Facts: llama.cpp, ``conversion/deepseek.py`` ``DeepseekV2Model`` and ``src/models/deepseek2.cpp``, which reads ``q_lora_rank`` by the number
of blocks; config defaults: transformers 5, ``models/deepseek_v2`` and ``deepseek_v3``. One family for both: V3 gates by a sigmoid and has
a correction of each expert's score, V2 gates by a softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import NORM, Field, as_float32, number, positive
from qformats.architectures.mapping import Rule
from qformats.architectures.rope import full_rope, rope_parameters
from qformats.architectures.splits import Split
from qformats.errors import BadFile, Unsupported

__all__ = ["DEEPSEEK2"]

LAYER = "model.layers.{i}."
ATTENTION = LAYER + "self_attn."
EXPERT = LAYER + "mlp.experts.{e}."
SHARED = LAYER + "mlp.shared_experts."
_SOFTMAX, _SIGMOID = 1, 2
_LOG_MUL = "rope.scaling.yarn_log_multiplier"
_LITE = (26, 27)  # llama.cpp reads no q_lora_rank of models with so many blocks, nor of the next with such a vocabulary; else it must be
_LITE_BY_VOCABULARY = (48, 128256)
_V2 = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 2048, "first_k_dense_replace": 0, "num_experts": 64, "n_shared_experts": 2, "routed_scaling_factor": 1.0,
    "norm_topk_prob": False, "moe_intermediate_size": 1407,
}  # fmt: skip
_V3 = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
    "max_position_embeddings": 4096, "first_k_dense_replace": 3, "num_experts": 256, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
}  # fmt: skip


def _derive(full: dict[str, Any]) -> None:
    is_v3 = full.get("model_type") == "deepseek_v3" or "DeepseekV3ForCausalLM" in (full.get("architectures") or ())
    gating = full.setdefault("gating", _SIGMOID if is_v3 else _SOFTMAX)
    for name, value in (_V3 if is_v3 else _V2).items():
        full.setdefault(name, value)
    rotated = positive(full, "qk_rope_head_dim")
    full.setdefault("qk_nope_head_dim", positive(full, "qk_head_dim") - rotated if "qk_head_dim" in full else 128)
    full["head_dim"] = full["qk_head_dim"] = positive(full, "qk_nope_head_dim") + rotated
    full["mla_key_length"] = positive(full, "kv_lora_rank") + rotated
    full["num_key_value_heads"] = full.get("num_attention_heads")
    full["has_q_lora"], full["has_correction"] = full.get("q_lora_rank") is not None, gating == _SIGMOID
    if gating == _SOFTMAX and (full.get("n_group") or 1) > 1:
        full["group_score"] = "best"
    full.pop("partial_rotary_factor", None)


def _letters(full: Mapping[str, Any]) -> dict[str, int]:
    """B dense blocks, n and r parts of a key without and with rotation, v a value's size, c and q latent sizes, s shared experts' size."""
    dense = full["first_k_dense_replace"]
    if not isinstance(dense, int) or isinstance(dense, bool) or dense < 0:
        raise BadFile("config-field", f"config field 'first_k_dense_replace' is {dense!r}, expected a whole number")
    sizes = {"n": "qk_nope_head_dim", "r": "qk_rope_head_dim", "v": "v_head_dim", "c": "kv_lora_rank"}
    made = {letter: positive(full, name) for letter, name in sizes.items()}
    made["q"] = positive(full, "q_lora_rank") if full["has_q_lora"] else 1
    made["s"] = positive(full, "moe_intermediate_size") * positive(full, "n_shared_experts")
    made["k"], made["o"] = made["c"] + made["r"], positive(full, "num_attention_heads") * made["v"]
    return {**made, "B": min(dense, positive(full, "num_hidden_layers"))}


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    layers = full["num_hidden_layers"]
    if full["has_q_lora"] == (layers in _LITE or (layers, full["vocab_size"]) == _LITE_BY_VOCABULARY):
        wanted = "without" if full["has_q_lora"] else "with"
        raise Unsupported("config-value", f"llama.cpp's 'deepseek2' of {layers} blocks is one {wanted} q_lora_rank")
    keys: list[tuple[str, str, Any]] = [] if full.get("norm_topk_prob") else [("expert_weights_norm", "bool", None)]
    rope = full_rope(rope_parameters(full))
    if rope.get("rope_type") == "yarn" and rope.get("mscale_all_dim"):
        everywhere = number(rope, "mscale_all_dim")
        if rope.get("mscale") != everywhere:  # src/llama-context.cpp computes with one for both
            found = f"mscale is {rope.get('mscale')!r}, mscale_all_dim {everywhere}"
            raise Unsupported("config-value", f"{found}; llama.cpp's 'deepseek2' has one for both")
        keys.append((_LOG_MUL, "f32", as_float32(0.1 * everywhere)))
    return keys


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    version = "V3" if config.get("gating") == _SIGMOID else "V2"
    config.update({"architectures": [f"Deepseek{version}ForCausalLM"], "model_type": f"deepseek_{version.lower()}"})
    config["qk_nope_head_dim"] = positive(config, "qk_head_dim") - positive(config, "qk_rope_head_dim")
    config["head_dim"] = config["qk_rope_head_dim"]
    config.setdefault("q_lora_rank", None)
    config.setdefault("norm_topk_prob", False)
    config["num_key_value_heads"] = config["num_attention_heads"]
    if version == "V2":
        config["topk_method"] = "group_limited_greedy" if config.get("n_group", 1) > 1 else "greedy"
    rope = config["rope_parameters"]
    rope.pop("partial_rotary_factor", None)
    if _LOG_MUL in values:
        rope["mscale"] = rope["mscale_all_dim"] = round(values[_LOG_MUL] * 10, 6)
    for name in ("gating", "qk_head_dim", "mla_key_length", "has_q_lora", "has_correction"):
        config.pop(name, None)


DEEPSEEK2 = Architecture(
    name="deepseek2",
    gguf="deepseek2",
    hf_classes=("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"),
    model_types=("deepseek_v3", "deepseek_v2"),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm"),
        Rule(ATTENTION + "q_proj", "blk.{i}.attn_q", "QH", unless="has_q_lora"),
        Rule(ATTENTION + "q_a_proj", "blk.{i}.attn_q_a", "qH", when="has_q_lora"),
        Rule(ATTENTION + "q_a_layernorm", "blk.{i}.attn_q_a_norm", "q", "norm", when="has_q_lora"),
        Rule(ATTENTION + "q_b_proj", "blk.{i}.attn_q_b", "Qq", when="has_q_lora"),
        Rule(ATTENTION + "kv_a_proj_with_mqa", "blk.{i}.attn_kv_a_mqa", "kH"),
        Rule(ATTENTION + "kv_a_layernorm", "blk.{i}.attn_kv_a_norm", "c", "norm"),
        Rule(ATTENTION + "kv_b_proj", "blk.{i}.attn_k_b", "Acn", split=Split("heads", "weight", 0, 2)),
        Rule(ATTENTION + "kv_b_proj", "blk.{i}.attn_v_b", "Avc", split=Split("heads", "weight", 1, 2)),
        Rule(ATTENTION + "o_proj", "blk.{i}.attn_output", "Ho"),
        Rule(LAYER + "mlp.gate_proj", "blk.{i}.ffn_gate", "FH", until="B"),
        Rule(LAYER + "mlp.up_proj", "blk.{i}.ffn_up", "FH", until="B"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF", until="B"),
        Rule(LAYER + "mlp.gate", "blk.{i}.ffn_gate_inp", "EH", "router", since="B"),
        Rule(LAYER + "mlp.gate", "blk.{i}.exp_probs_b", "E", "bias", leaf="e_score_correction_bias", gguf_leaf="bias", since="B",
             when="has_correction"),
        Rule(EXPERT + "gate_proj", "blk.{i}.ffn_gate_exps", "EXH", "experts", fused=("gate_up_proj", 0, 2), since="B"),
        Rule(EXPERT + "up_proj", "blk.{i}.ffn_up_exps", "EXH", "experts", fused=("gate_up_proj", 1, 2), since="B"),
        Rule(EXPERT + "down_proj", "blk.{i}.ffn_down_exps", "EHX", "experts", fused=("down_proj", 0, 1), since="B"),
        Rule(SHARED + "gate_proj", "blk.{i}.ffn_gate_shexp", "sH", since="B"),
        Rule(SHARED + "up_proj", "blk.{i}.ffn_up_shexp", "sH", since="B"),
        Rule(SHARED + "down_proj", "blk.{i}.ffn_down_shexp", "Hs", since="B"),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=(
        Field("block_count", "u32", "num_hidden_layers"), Field("context_length", "u32", "max_position_embeddings"),
        Field("embedding_length", "u32", "hidden_size"), Field("feed_forward_length", "u32", "intermediate_size"),
        Field("attention.head_count", "u32", "num_attention_heads"), Field("attention.head_count_kv", "u32", constant=1),
    ),
    first_own_key="leading_dense_block_count",
    after=(
        *NORM, Field("expert_count", "u32", "num_experts"), Field("expert_used_count", "u32", "num_experts_per_tok"),
        Field("expert_group_count", "u32", "n_group"), Field("expert_group_used_count", "u32", "topk_group"),
        Field("expert_gating_func", "u32", "gating"),
        Field("attention.key_length", "u32", "mla_key_length"), Field("attention.value_length", "u32", "kv_lora_rank"),
        Field("leading_dense_block_count", "u32", "first_k_dense_replace"),
        Field("vocab_size", "u32", "vocab_size"), Field("attention.q_lora_rank", "u32", "q_lora_rank"),
        Field("attention.kv_lora_rank", "u32", "kv_lora_rank"), Field("attention.key_length_mla", "u32", "qk_head_dim"),
        Field("attention.value_length_mla", "u32", "v_head_dim"), Field("expert_feed_forward_length", "u32", "moe_intermediate_size"),
        Field("expert_shared_count", "u32", "n_shared_experts"), Field("expert_weights_scale", "f32", "routed_scaling_factor"),
        Field("expert_weights_norm", "bool", "norm_topk_prob"), Field("rope.dimension_count", "u32", "qk_rope_head_dim"),
    ),
    defaults={
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    rebuilt={"hidden_act": "silu", "attention_bias": False, "q_lora_rank": None},
    fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "rope_interleave": (True,)},
    ignored={"group_score": ("the two best",)},
    nullable=("q_lora_rank",),
    names={"num_experts": "n_routed_experts"},
    complete=_derive,
    letters=_letters,
    adjust=_rebuild,
    own_keys=_own_keys,
)  # fmt: skip

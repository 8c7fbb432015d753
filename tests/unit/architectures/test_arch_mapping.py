"""Names and row operations: each family both ways, exact inverses, and the errors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from qformats.architectures import FAMILIES, Mapped, SourceRows, TensorMap, find
from qformats.architectures.rows import inverse_order, qkv_order, rope_order
from qformats.architectures.splits import joined_shape
from qformats.errors import BadFile, QFormatError, Unsupported

BASE: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 11, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20,
    "vocab_size": 30, "head_dim": 8, "num_experts": 3, "moe_intermediate_size": 6, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 10, "query_pre_attn_scalar": 8,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True}, "stablelm": {"qk_layernorm": True},
    "falcon": {"new_decoder_architecture": True, "activation": "gelu_new"},
    "gpt_neox": {"num_key_value_heads": 4, "hidden_act": "gelu_new"}, "phi2": {"hidden_act": "gelu_new"},
    "starcoder2": {"hidden_act": "gelu_new"}, "olmoe": {"num_key_value_heads": 4},
    "lfm2": {"block_auto_adjust_ff_dim": False, "full_attn_idxs": [2, 5]},
    "llama4": {"interleave_moe_layer_step": 3, "intermediate_size_mlp": 14},
    "qwen3_next": {"linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 6},
    "mamba": {"intermediate_size": 48, "state_size": 5, "conv_kernel": 3}, "granitemoe": {"shared_intermediate_size": 7},
    "deepseek2": {"q_lora_rank": 5, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3},
    "gpt_oss": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
}  # fmt: skip
FAMILY_NAMES = [family.name for family in FAMILIES]


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    family = next(family for family in FAMILIES if family.name == name)
    config = {**BASE, "architectures": [family.hf_classes[0]], **CHANGES.get(name, {})}
    if not family.free_heads:
        config["hidden_size"] = config["head_dim"] * config["num_attention_heads"]
    return {**config, **changes}


def hf_parts(name: str, config: dict[str, Any], bias: bool = False) -> dict[str, dict[str, tuple[int, ...]]]:
    """The modules a checkpoint of this family has, from its rules."""
    binding = find(config).bind(config)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for rule in binding.rules:
        if rule.kind == "output" and binding.tied:
            continue
        for layer in filter(lambda n: rule.in_block(n, binding.dims), range(binding.dims["L"] if "{i}" in rule.hf else 1)):
            shape = rule.sizes(binding.dims, hf=True)
            if rule.split is not None:
                together = [r for r in binding.rules if r.split and (r.hf, r.split.leaf) == (rule.hf, rule.split.leaf)]
                shapes = [r.sizes(binding.dims) for r in together]
                parts.setdefault(rule.hf.format(i=layer), {})[rule.split.leaf] = joined_shape(rule.split, shapes, packed=False)
                continue
            for expert in range(shape[0] if "{e}" in rule.hf else 1):
                leaves = {rule.leaf: shape[1:] if "{e}" in rule.hf else shape[::-1] if rule.transposed else shape}
                if rule.bias and bias:
                    leaves["bias"] = shape[:1]
                parts.setdefault(rule.hf.format(i=layer, e=expert), {}).update(leaves)
    return parts


def fill(parts: dict[str, dict[str, tuple[int, ...]]]) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)
    return {(m, leaf): rng.standard_normal(shape).astype(np.float32) for m, leaves in parts.items() for leaf, shape in leaves.items()}


def build(mapped: Mapped, values: dict[tuple[str, str], np.ndarray[Any, Any]]) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    """Carry out a mapping, checking each piece's period on the way."""
    return {(tensor.target, tensor.leaf): build_one(tensor, values) for tensor in mapped.tensors}


def build_one(tensor: TensorMap, values: dict[tuple[str, str], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    if tensor.constant is not None:
        return tensor.constant
    pieces = [piece_rows(piece, tensor, values) for piece in tensor.sources]
    if tensor.weave == "beside":
        pieces = [np.concatenate(pair, 1) for pair in zip(pieces[::2], pieces[1::2], strict=True)]
    elif tensor.weave:
        axis = {"rows": 1, "columns": 2}[tensor.weave]
        pieces = [np.stack(pair, axis).reshape(-1, tensor.shape[-1]) for pair in zip(pieces[::2], pieces[1::2], strict=True)]
    made = np.concatenate(pieces).reshape(tensor.shape) + np.float32(tensor.shift)
    if tensor.function:
        made = tensor.alter(torch.from_numpy(made)).numpy()
    assert tensor.rows == (np.prod(tensor.shape[:-1]) if len(tensor.shape) > 1 else tensor.shape[0])
    return made


def piece_rows(piece: SourceRows, tensor: TensorMap, values: dict[tuple[str, str], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    if not piece.module:
        return np.zeros((piece.stop - piece.start, width), np.float32)
    stored = values[piece.module, piece.leaf]
    if piece.columns != (0, 1):
        first, step = piece.columns
        chosen: np.ndarray[Any, Any] = stored[piece.start : piece.stop, first::step]
        return chosen
    if piece.transposed is not None:
        first, last = piece.transposed
        stored = stored.reshape(-1, stored.shape[-1])[first:last].T
    elif not tensor.weave:
        stored = stored.reshape(-1, width)
    elif tensor.weave == "rows":
        stored = stored.reshape(-1, stored.shape[-1])
    rows = stored[piece.start : piece.stop]
    if piece.index is not None and piece.index.max() >= len(rows):
        chosen = stored[piece.start + piece.index]
        return chosen
    if piece.index is not None:
        assert np.array_equal(np.sort(piece.index), np.arange(len(rows)))
        period = piece.period or len(rows)
        assert np.array_equal(piece.index // period, np.arange(len(rows)) // period)
        rows = rows[piece.index]
    return rows


def gguf_parts(mapped: Mapped) -> dict[str, dict[str, tuple[int, ...]]]:
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in mapped.tensors:
        parts.setdefault(tensor.target, {})[tensor.leaf] = tensor.shape
    return parts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_to_hf_undoes_to_gguf(name: str, bias: bool) -> None:
    config = config_of(name)
    binding = find(config).bind(config)
    parts = hf_parts(name, config, bias)
    values = fill(parts)
    forward = binding.to_gguf(parts)
    back = binding.to_hf(gguf_parts(forward))
    restored = build(back, build(forward, values))
    assert forward.dropped == {}
    assert restored.keys() == values.keys()
    for key, value in values.items():
        assert restored[key].shape == value.shape
        assert np.allclose(restored[key], value, atol=0 if "norm" not in key[0] and key[1] != "A_log" else 1e-6), key


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_names_are_those_of_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    config = config_of(name)
    binding = find(config).bind(config)
    arch = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[binding.architecture.gguf]
    names = gguf.get_tensor_name_map(arch, binding.dims["L"])
    for tensor in binding.to_gguf(hf_parts(name, config, bias=True)).tensors:
        module, leaf = tensor.sources[0].module, tensor.sources[0].leaf
        parted = tensor.target.endswith("attn_v_b") or "_linear" in module or module.endswith("_qkvz")
        if leaf not in ("weight", "bias") or tensor.sources[0].transposed or parted:
            known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]}
            assert re.sub(r"blk\.\d+", "blk.{bid}", tensor.target if tensor.leaf in ("weight", "bias") else tensor.name) in known
            continue
        merged = module.replace("experts.0.", "experts.").replace("norm.norms.0", "norm")
        if name == "bloom":  # its converter cuts the first word off
            merged = merged.removeprefix("transformer.")
        assert names.get_name(f"{merged}.{tensor.leaf}", try_suffixes=(".weight", ".bias")) == tensor.name


def test_rope_order_is_the_converters_permutation() -> None:
    weight = np.arange(4 * 8 * 3).reshape(32, 3)
    expected = weight.reshape(4, 2, 4, 3).swapaxes(1, 2).reshape(32, 3)
    order = rope_order(4, 8)
    assert np.array_equal(weight[order], expected)
    assert np.array_equal(weight[order][inverse_order(order)], weight)


def test_blocks_follow_in_numeric_order_between_embedding_and_output() -> None:
    config = config_of("llama")
    names = [t.target for t in find(config).bind(config).to_gguf(hf_parts("llama", config)).tensors]
    assert names[0] == "token_embd"
    assert names[-2:] == ["output_norm", "output"]
    assert [int(n.split(".")[1]) for n in names[1:-2]] == sorted(int(n.split(".")[1]) for n in names[1:-2])


def test_order_does_not_depend_on_the_order_of_the_source() -> None:
    config = config_of("gemma3")
    binding, parts = find(config).bind(config), hf_parts("gemma3", config)
    names = [t.name for t in binding.to_gguf(parts).tensors]
    assert names == [t.name for t in binding.to_gguf(dict(reversed(parts.items()))).tensors]


def test_fused_experts_give_the_same_tensors_as_single_ones() -> None:
    config = config_of("qwen3_moe", num_hidden_layers=1)
    binding, parts = find(config).bind(config), hf_parts("qwen3_moe", config)
    values = fill(parts)
    single = build(binding.to_gguf(parts), values)
    base = "model.layers.0.mlp.experts"
    stack = lambda leaf: np.stack([values[f"{base}.{e}.{leaf}", "weight"] for e in range(3)])  # noqa: E731
    fused = {key: value for key, value in values.items() if ".experts." not in key[0]}
    fused[base, "gate_up_proj"] = np.concatenate([stack("gate_proj"), stack("up_proj")], axis=1)
    fused[base, "down_proj"] = stack("down_proj")
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for (module, leaf), value in fused.items():
        shapes.setdefault(module, {})[leaf] = value.shape
    both = build(binding.to_gguf(shapes), fused)
    assert both.keys() == single.keys()
    assert all(np.array_equal(both[key], single[key]) for key in both)


def test_gemma_rows_beyond_the_vocabulary_are_cut_and_come_back_as_zeros() -> None:
    config = config_of("gemma3")
    binding, parts = find(config).bind(config), hf_parts("gemma3", config)
    parts["model.embed_tokens"]["weight"] = (37, 24)
    forward = binding.to_gguf(parts)
    assert forward.tensors[0].shape == (30, 24)
    wider = find(config).bind({**config, "vocab_size": 37})
    embedding = wider.to_hf(gguf_parts(forward)).tensors[0]
    assert embedding.shape == (37, 24)
    assert [(p.module, p.start, p.stop) for p in embedding.sources] == [("token_embd", 0, 30), ("", 0, 7)]


def test_gemma_norms_are_shifted_by_one_and_back() -> None:
    config = config_of("gemma3")
    binding = find(config).bind(config)
    forward = binding.to_gguf(hf_parts("gemma3", config))
    assert {t.shift for t in forward.tensors if t.kind == "norm"} == {1.0}
    assert {t.shift for t in forward.tensors if t.kind != "norm"} == {0.0}
    assert {t.shift for t in binding.to_hf(gguf_parts(forward)).tensors if t.kind == "norm"} == {-1.0}


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_checkpoint(prefix: str) -> None:
    config = config_of("gemma3")
    plain = hf_parts("gemma3", config)
    parts = {(prefix + m if prefix == "language_model." else m.replace("model.", prefix, 1)): s for m, s in plain.items()}
    parts["model.vision_tower.encoder.layers.0.mlp"] = {"weight": (3, 3)}
    mapped = find(config).bind({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}).to_gguf(parts)
    assert len(mapped.tensors) == len(plain)
    assert list(mapped.dropped) == ["model.vision_tower.encoder.layers.0.mlp.weight"]


def test_buffers_and_a_tied_head_are_dropped_with_a_reason() -> None:
    config = config_of("llama", tie_word_embeddings=True)
    parts = hf_parts("llama", config)
    parts["lm_head"] = {"weight": (30, 24)}
    parts["model.layers.0.self_attn.rotary_emb"] = {"inv_freq": (4,)}
    mapped = find(config).bind(config).to_gguf(parts)
    assert set(mapped.dropped) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert "output" not in [t.target for t in mapped.tensors]


def test_config_fields_llama_cpp_ignores_are_reported() -> None:
    config = config_of("qwen3_moe", use_sliding_window=True)
    assert "config:use_sliding_window" in find(config).bind(config).to_gguf(hf_parts("qwen3_moe", config)).dropped


@pytest.mark.parametrize("change", [{"norm_topk_prob": False}, {"norm_topk_prob": None}])
def test_experts_that_llama_cpp_would_weigh_otherwise_are_refused(change: dict[str, Any]) -> None:
    config = {k: v for k, v in config_of("qwen3_moe", **change).items() if v is not None}
    with pytest.raises(Unsupported) as caught:
        find(config).bind(config)
    assert caught.value.code == "config-value"


def test_names_of_a_base_model_and_its_masks() -> None:
    config = config_of("gpt2")
    binding, parts = find(config).bind(config), hf_parts("gpt2", config, bias=True)
    bare = {name.removeprefix("transformer."): leaves for name, leaves in parts.items()}
    bare["h.0.attn"] = {"bias": (1, 1, 8, 8)}
    mapped = binding.to_gguf(bare)
    assert [t.name for t in mapped.tensors] == [t.name for t in binding.to_gguf(parts).tensors]
    assert mapped.dropped == {"h.0.attn.bias": "a buffer that the model computes itself"}


def test_one_row_may_be_stored_as_a_vector() -> None:
    config = config_of("qwen2_moe", num_hidden_layers=1)
    binding, parts = find(config).bind(config), hf_parts("qwen2_moe", config)
    stored = gguf_parts(binding.to_gguf(parts))
    stored["blk.0.ffn_gate_inp_shexp"] = {"weight": (24,)}
    found = {t.target: t for t in binding.to_hf(stored).tensors}["model.layers.0.mlp.shared_expert_gate"]
    assert found.shape == (1, 24) and [(s.start, s.stop) for s in found.sources] == [(0, 1)]


def test_a_fused_projection_is_regrouped_as_llama_cpps_converter_does() -> None:
    stored = np.arange(8 * 4 * 3).reshape(32, 3)  # 4 heads and 2 key-value heads of 4
    grouped = stored.reshape(2, 4, 4, 3)
    expected = np.concatenate([part.reshape(-1, 3) for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])])
    order = qkv_order(4, 2, 4)
    assert np.array_equal(stored[order], expected)
    assert np.array_equal(stored[order][inverse_order(order)], stored)


def test_heads_that_llama_cpp_does_not_know_are_refused() -> None:
    with pytest.raises(Unsupported, match="head_dim"):
        find(config_of("granite")).bind(config_of("granite", hidden_size=24))


def test_producers_of_act_order() -> None:
    config = config_of("qwen3_moe")
    binding = find(config).bind(config)
    assert binding.producers("model.layers.1.mlp.experts.2.down_proj") == (
        ("model.layers.1.mlp.experts.2.gate_proj", "rows"),
        ("model.layers.1.mlp.experts.2.up_proj", "rows"),
    )
    assert binding.producers("model.layers.1.self_attn.o_proj") == (("model.layers.1.self_attn.v_proj", "per-head"),)
    assert binding.producers("model.layers.1.self_attn.q_proj") == ()


def _missing(parts: dict[str, Any]) -> None:
    del parts["model.layers.3.mlp.up_proj"]


def _unknown(parts: dict[str, Any]) -> None:
    parts["model.layers.3.mlp.extra_proj"] = {"weight": (4, 4)}


def _unknown_leaf(parts: dict[str, Any]) -> None:
    parts["model.norm"]["offset"] = (24,)


def _wrong_shape(parts: dict[str, Any]) -> None:
    parts["model.layers.3.mlp.up_proj"] = {"weight": (21, 24)}


def _too_many_layers(parts: dict[str, Any]) -> None:
    parts["model.layers.11.mlp.up_proj"] = {"weight": (20, 24)}


def _scalar(parts: dict[str, Any]) -> None:
    parts["model.layers.3.self_attn.q_proj"] = {"weight": ()}


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (_missing, "missing-tensor"), (_unknown, "unmapped-tensor"), (_unknown_leaf, "unmapped-tensor"),
        (_wrong_shape, "tensor-shape"), (_too_many_layers, "unmapped-tensor"), (_scalar, "tensor-shape"),
    ],
)  # fmt: skip
def test_tensors_that_disagree_with_the_config(damage: Any, code: str) -> None:
    config = config_of("llama")
    parts = hf_parts("llama", config)
    damage(parts)
    with pytest.raises(BadFile) as caught:
        find(config).bind(config).to_gguf(parts)
    assert caught.value.code == code
    assert caught.value.tensor


def test_a_missing_expert_is_named() -> None:
    config = config_of("qwen3_moe")
    parts = hf_parts("qwen3_moe", config)
    del parts["model.layers.2.mlp.experts.1.up_proj"]
    with pytest.raises(BadFile, match=r"experts\.1\.up_proj") as caught:
        find(config).bind(config).to_gguf(parts)
    assert caught.value.code == "missing-tensor"


@pytest.mark.parametrize(
    ("changes", "code", "kind"),
    [
        ({"hidden_size": None}, "config-field", BadFile), ({"num_hidden_layers": "2"}, "config-field", BadFile),
        ({"num_attention_heads": 0}, "config-field", BadFile), ({"vocab_size": True}, "config-field", BadFile),
        ({"num_key_value_heads": 3}, "config-field", BadFile), ({"head_dim": 7}, "config-field", BadFile),
        ({"hidden_act": "gelu"}, "config-value", Unsupported),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_bound(changes: dict[str, Any], code: str, kind: type[QFormatError]) -> None:
    config = config_of("llama", **changes)
    with pytest.raises(kind) as caught:
        find(config).bind(config)
    assert caught.value.code == code


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(Unsupported, match="LlamaForCausalLM") as caught:
        find({"architectures": ["OtherForCausalLM"]})
    assert caught.value.code == "architecture"


def test_deepseeks_keys_and_values_come_apart_and_further_predictions_are_named() -> None:
    config = config_of("deepseek2", num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=1)
    binding, parts = find(config).bind(config), hf_parts("deepseek2", config)
    parts["model.layers.1.eh_proj"] = {"weight": (24, 48)}
    mapped = binding.to_gguf(parts)
    assert set(mapped.dropped) == {"model.layers.1.eh_proj.weight"}
    values = fill(parts)
    made, kv_b = build(mapped, values), values["model.layers.0.self_attn.kv_b_proj", "weight"].reshape(4, 7, 6)
    assert np.array_equal(made["blk.0.attn_k_b", "weight"], kv_b[:, :4].swapaxes(1, 2))
    assert np.array_equal(made["blk.0.attn_v_b", "weight"], kv_b[:, 4:])


def test_norms_of_the_first_bert_are_read_under_their_old_names() -> None:
    config = config_of("bert")
    binding = find(config).bind(config)
    parts = hf_parts("bert", config, bias=True)
    words = {"weight": "gamma", "bias": "beta"}
    old = {m: {words[leaf] if m.endswith("LayerNorm") else leaf: s for leaf, s in leaves.items()} for m, leaves in parts.items()}
    plain, renamed = binding.to_gguf(parts).tensors, binding.to_gguf(old).tensors
    assert [(t.name, t.shape) for t in plain] == [(t.name, t.shape) for t in renamed]
    assert {t.sources[0].leaf for t in renamed if t.kind == "norm"} == {"gamma"}


def test_a_decay_that_is_none_is_refused() -> None:
    tensor = TensorMap("backbone.layers.0.mixer", "A_log", (2,), (), kind="state", function="log(-x)")
    assert torch.equal(tensor.alter(torch.tensor([-1.0, -1.0])), torch.zeros(2))
    with pytest.raises(BadFile) as caught:
        tensor.alter(torch.tensor([-1.0, 0.0]))
    assert caught.value.code == "tensor-value"

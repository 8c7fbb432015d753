"""llama.cpp's file types: which tensors change, which type each gets. The real one is asked in ``tests/real/test_mixes.py``."""

from __future__ import annotations

from typing import Any

import pytest

from qformats import registry
from qformats.errors import Unsupported
from qformats.formats.ggml.mixes import FILE_TYPES, Model, Wish, allows_quantization, choose, fallback, file_type, requires_imatrix

Shapes = dict[str, tuple[int, ...]]


def tensors(layers: int, *, k: int = 256, experts: int = 0, tied: bool = False) -> Shapes:
    found: Shapes = {"output_norm.weight": (k,), "token_embd.weight": (8, k)}
    if not tied:
        found["output.weight"] = (8, k)
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"blk.{layer}.{name}.weight"] = (8, k)
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            found[f"blk.{layer}.{name}{'_exps' if experts else ''}.weight"] = (experts, 8, k) if experts else (8, k)
    return found


def types(kind: str, shapes: Shapes, model: Model, **wish: Any) -> dict[str, str]:
    return choose(Wish(FILE_TYPES[kind], **wish), model, shapes)


def layers_of(found: dict[str, str], role: str, layers: int) -> str:
    """One character a layer: the bits of its type."""
    return "".join(next(c for c in found[f"blk.{layer}.{role}.weight"] if c.isdigit()) for layer in range(layers))


LLAMA = Model("llama", 16, heads=8, heads_kv=8)
GROUPED = Model("llama", 16, heads=8, heads_kv=2)


@pytest.mark.parametrize(("kind", "model", "values", "down", "head"), [
    ("q4_0", LLAMA, "4" * 16, "4" * 16, "q6_k"),
    ("q8_0", LLAMA, "8" * 16, "8" * 16, "q8_0"),
    ("q2_k", LLAMA, "3" * 16, "3" * 16, "q6_k"),
    ("q2_k", GROUPED, "4" * 16, "3" * 16, "q6_k"),
    ("q2_k_s", GROUPED, "4" * 16, "44" + "2" * 14, "q6_k"),
    ("q3_k_s", LLAMA, "3" * 16, "3" * 16, "q6_k"),
    ("q3_k_m", LLAMA, "55" + "4" * 14, "5" + "4" * 15, "q6_k"),
    ("q3_k_l", LLAMA, "5" * 16, "5" * 16, "q6_k"),
    ("q4_k_s", LLAMA, "5555" + "4" * 12, "55" + "4" * 14, "q6_k"),
    ("q4_k_m", LLAMA, "6644644644644666", "6644644644644666", "q6_k"),
    ("q5_k_m", LLAMA, "6655655655655666", "6655655655655666", "q6_k"),
    ("iq4_xs", LLAMA, "4" * 16, "55" + "4" * 14, "q6_k"),
    ("iq4_nl", GROUPED, "5" * 16, "55" + "4" * 14, "q6_k"),
    ("iq3_xxs", LLAMA, "3" * 16, "44" + "3" * 14, "q5_k"),
    ("iq2_xs", GROUPED, "4" * 16, "2" * 16, "q5_k"),
    ("iq2_m", LLAMA, "3" * 16, "33" + "2" * 14, "q5_k"),
    ("iq1_s", LLAMA, "2" * 16, "22" + "1" * 14, "q5_k"),
])  # fmt: skip
def test_layers_of_a_llama(kind: str, model: Model, values: str, down: str, head: str) -> None:
    found = types(kind, tensors(16), model)
    assert (layers_of(found, "attn_v", 16), layers_of(found, "ffn_down", 16), found["output.weight"]) == (values, down, head)
    assert "output_norm.weight" not in found


def test_an_importance_matrix_changes_rules() -> None:
    for kind, down in (("q4_0", "q4_1"), ("q5_0", "q5_1")):
        found = types(kind, tensors(16), LLAMA, with_imatrix=True)
        assert [found[f"blk.{layer}.ffn_down.weight"] for layer in (0, 1, 2)] == [down, down, kind]
    assert layers_of(types("iq4_xs", tensors(16), LLAMA, with_imatrix=True), "ffn_down", 16) == "4" * 16
    with_matrix = types("iq3_xxs", tensors(16), LLAMA, with_imatrix=True)
    assert with_matrix["blk.0.attn_v.weight"] == "iq3_xxs" == with_matrix["blk.0.ffn_down.weight"]


def test_experts() -> None:
    shapes = {**tensors(16, experts=8), "blk.0.ffn_gate_inp.weight": (8, 256)}
    found = types("q4_k_m", shapes, Model("llama", 16, 8, 2, experts=8))
    assert (found["blk.5.attn_k.weight"], found["blk.5.attn_v.weight"], found["blk.5.attn_output.weight"]) == ("q8_0", "q8_0", "q5_k")
    assert layers_of(found, "ffn_down_exps", 16) == "6644644644644666" and "blk.0.ffn_gate_inp.weight" not in found
    moe = types("mxfp4_moe", shapes, Model("llama", 16, 8, 2, experts=8))
    assert moe["blk.3.ffn_up_exps.weight"] == "mxfp4" and moe["blk.3.attn_q.weight"] == "q8_0" == moe["output.weight"]


def test_expert_layers_count_by_name() -> None:
    """Layers without experts do not shift those with."""
    shapes = {name: shape for name, shape in tensors(16, experts=4).items() if not name.startswith(("blk.0.ffn", "blk.1.ffn"))}
    found = types("q4_k_m", shapes, Model("qwen3moe", 16, 8, 2, experts=4))
    assert (found["blk.2.ffn_down_exps.weight"], found["blk.4.ffn_down_exps.weight"]) == ("q4_k", "q6_k")
    with pytest.raises(Unsupported) as caught:
        types("q4_k_m", {"ffn_down_exps.weight": (4, 8, 256)}, Model("qwen3moe", 16, experts=4))
    assert caught.value.code == "layer-number"


def test_falcon_and_70b() -> None:
    falcon = types("q4_k_m", tensors(16), Model("falcon", 16, 8, 8))
    assert layers_of(falcon, "ffn_down", 16) == "6544544544544555" and falcon["output.weight"] == "q8_0"
    big = types("q3_k_s", tensors(80), Model("llama", 80, 64, 8))
    plain = types("q3_k_s", tensors(80), Model("llama", 80, 64, 64))
    assert big["blk.40.attn_v.weight"] == "q5_k" and plain["blk.40.attn_v.weight"] == "q3_k"
    assert Model("qwen2", 80, 8, 8).is_70b and not Model("llama", 80, 8, 2, experts=8).is_70b


def test_an_embedding_that_is_the_head_too() -> None:
    assert types("q4_k_s", tensors(4, tied=True), LLAMA)["token_embd.weight"] == "q6_k"
    assert types("q4_k_s", tensors(4), LLAMA)["token_embd.weight"] == "q4_k"
    assert types("iq2_xs", tensors(4), LLAMA)["token_embd.weight"] == "q2_k"


def test_overrides_and_their_order() -> None:
    wish: dict[str, Any] = {"tensor_types": (("attn_v", "q8_0"), ("BLK.1.attn", "q5_0"), ("token_embd|output.weight", "q4_0"))}
    found = types("q4_k_s", tensors(4), LLAMA, **wish)
    assert found["blk.1.attn_v.weight"] == "q8_0" and found["blk.1.attn_q.weight"] == "q5_0" and found["output.weight"] == "q4_0"
    found = types("q4_k_s", tensors(4), LLAMA, output_type="q5_k", embedding_type="q3_k", **wish)
    assert (found["output.weight"], found["token_embd.weight"]) == ("q5_k", "q3_k")
    assert types("q4_k_s", tensors(4, tied=True), LLAMA, output_type="q5_k")["token_embd.weight"] == "q5_k"
    assert set(types("q4_k_m", tensors(4), LLAMA, pure=True).values()) == {"q4_k"}
    layers = {"per_layer_token_embd.weight": (8, 256), **tensors(1)}
    found = types("q4_k_s", layers, LLAMA, embedding_type="q3_k", tensor_types=(("token_embd", "q5_0"),))
    assert (found["per_layer_token_embd.weight"], found["token_embd.weight"]) == ("q5_0", "q3_k")


@pytest.mark.parametrize(("block", "small", "smallest"), [
    ("iq2_xs", "iq4_nl", "f16"), ("iq4_xs", "iq4_nl", "f16"), ("q2_k", "q4_0", "f16"), ("q3_k", "q4_0", "f16"), ("tq1_0", "q4_0", "f16"),
    ("q4_k", "q5_0", "f16"), ("q5_k", "q5_1", "f16"), ("q6_k", "q8_0", "f16"), ("q4_0", "q4_0", "f16"), ("mxfp4", "mxfp4", "f16"),
    ("q2_0", "q4_0", "f16"), ("f16", "f16", "f16"),
])  # fmt: skip
def test_rows_that_are_no_whole_blocks(block: str, small: str, smallest: str) -> None:
    assert (fallback(block, 512), fallback(block, 96), fallback(block, 100)) == (block, small, smallest)


def test_a_type_without_a_smaller_one() -> None:
    with pytest.raises(Unsupported) as caught:
        fallback("q1_0", 96)
    assert caught.value.code == "k-multiple"


@pytest.mark.parametrize(("name", "shape", "allowed"), [
    ("blk.0.attn_q.weight", (8, 256), True), ("blk.0.ffn_up_exps.weight", (4, 1, 256), True), ("blk.0.attn_norm.weight", (256,), False),
    ("blk.0.attn_q.weight", (1, 256), False), ("blk.0.attn_q.bias", (8, 256), False), ("blk.0.attn_q_norm.weight", (8, 256), False),
    ("position_embd.weight", (8, 256), False), ("blk.0.ffn_gate_inp.weight", (8, 256), False),
    ("blk.0.ffn_gate_inp_shexp.weight", (8, 256), True), ("blk.0.ssm_conv1d.weight", (8, 256), False), ("rope_freqs.weight", (64,), False),
])  # fmt: skip
def test_which_tensors_change(name: str, shape: tuple[int, ...], allowed: bool) -> None:
    assert allows_quantization(name, shape) is allowed


def test_what_cannot_be_made_blindly() -> None:
    assert requires_imatrix("blk.0.ffn_up.weight", "iq2_s", FILE_TYPES["iq2_m"])
    assert requires_imatrix("blk.0.ffn_up.weight", "q2_k", FILE_TYPES["q2_k_s"])
    assert not requires_imatrix("blk.0.ffn_up.weight", "q2_k", FILE_TYPES["q2_k"])
    assert not requires_imatrix("token_embd.weight", "iq3_xxs", FILE_TYPES["iq3_xxs"])


def test_model_facts_from_keys() -> None:
    keys = {"general.architecture": "gemma3", "gemma3.block_count": 26, "gemma3.attention.head_count": [8, 4]}
    assert Model.of({**keys, "gemma3.attention.head_count_kv": [2, 4]}) == Model("gemma3", 26, 8, 2, 0)
    assert Model.of(keys).gqa == 1 and Model("mamba", 4, 0, 0).gqa == 0


def test_every_file_type_can_be_named() -> None:
    row = registry.row("gguf")
    named = {*row.types, *row.mixes}
    assert named >= FILE_TYPES.keys() and all(file_type(name) is not None for name in row.mixes)
    assert file_type("q4_k") is FILE_TYPES["q4_k_m"] and file_type("mxfp4") is None
    assert registry.parse_target("gguf:Q3_K_L").type == "q3_k_l"

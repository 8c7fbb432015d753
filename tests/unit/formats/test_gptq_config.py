"""GPTQ configs: which one counts, how rules resolve, what an output says; and the target's options."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from qformats.errors import Unsupported, UsageError
from qformats.formats import awq, gptq
from qformats.formats.protocol import Target
from qformats.scheme import Integer, ParamSpec, Scheme, Storage, Tile

BASE: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def scheme_of(bits: int = 4, group: int = 32, shape: tuple[int, int] = (64, 256), act_order: bool = False) -> Scheme:
    tile = Tile((1, group))
    return Scheme(shape, Integer(bits), (ParamSpec("float16", tile),), ParamSpec("uint8", tile), group_index=act_order)


def storage(options: str, scheme: Scheme | None = None, which: int = 0) -> Storage:
    kind, *rest = options.split(",")
    pairs = {part.partition("=")[0]: part.partition("=")[2] for part in rest}
    return gptq.storages(Target("gptq", kind, pairs), scheme or scheme_of())[which]


# ---- which format


@pytest.mark.parametrize(
    ("config", "names", "format", "dialect"),
    [
        ({"quant_method": "gptq", "bits": 4}, [], "gptq", ""),
        ({"quant_method": "GPTQ", "bits": 4}, [], "gptq", ""),
        ({"bits": 4, "group_size": 128, "desc_act": True}, [], "gptq", ""),
        ({}, ["m.qweight", "m.g_idx"], "gptq", ""),
        ({}, ["m.qweight", "m.qzeros"], None, ""),
        ({}, ["m.weight"], None, ""),
        ({"quant_method": "awq", "bits": 4}, [], "awq", ""),
        ({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, [], "awq", ""),
        ({"quant_method": "auto-round", "bits": 4}, [], "gptq", "auto-round"),
        ({"quant_method": "intel/auto-round", "bits": 4, "backend": "auto_round:exllamav2", "sym": True}, [], "gptq", "auto-round"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:awq"}, [], "awq", "auto-round"),
        ({"quant_method": "bitsandbytes"}, [], None, ""),
        ({"quant_method": "compressed-tensors"}, ["m.g_idx"], None, ""),
    ],
)
def test_each_config_belongs_to_one_format(config: dict[str, Any], names: list[str], format: str | None, dialect: str) -> None:
    found = [match for match in (gptq.detect(config, names), awq.detect(config, names)) if match is not None]
    assert [(m.format, m.dialect) for m in found] == ([(format, dialect)] if format else [])


# ---- two configs


def test_quantize_config_wins_and_keeps_the_order_of_its_rules() -> None:
    rules = {"+:b.*": {"bits": 8}, "+:.*": {"bits": 2}}
    beside = BASE | {"dynamic": rules}
    inner = BASE | {"dynamic": {key: rules[key] for key in sorted(rules)}, "extra": 1}
    merged, warnings = gptq.reconcile(inner, beside)
    assert warnings == () and list(merged["dynamic"]) == list(rules) and merged["extra"] == 1
    assert gptq.module_settings(merged, "b.q").bits == 8 and gptq.module_settings(merged, "a.q").bits == 2


def test_a_difference_is_a_warning() -> None:
    merged, warnings = gptq.reconcile(BASE | {"group_size": 64}, BASE)
    assert merged["group_size"] == 128 and len(warnings) == 1 and "group_size" in warnings[0]
    assert gptq.reconcile(None, BASE) == (BASE, ()) and gptq.reconcile(BASE, None) == (BASE, ()) and gptq.reconcile(None, None) == ({}, ())


# ---- rules


@pytest.mark.parametrize(
    ("dynamic", "bits", "skipped"),
    [
        ({}, 4, False),
        ({"+:m.*": {"bits": 8}}, 8, False),
        ({"m.*": {"bits": 8}, "m.a": {"bits": 2}}, 8, False),
        ({"m.a": {"bits": 2}, "m.*": {"bits": 8}}, 2, False),
        ({"a": {"bits": 8}}, 4, False),  # rules match from the start of the name
        ({".*a$": {"bits": 8}}, 8, False),
        ({"-:m.*": {}, "+:m.a": {"bits": 8}}, 4, True),
        ({"+:m.*": {"group_size": 32}}, 4, False),
    ],
)
def test_the_first_matching_rule_counts(dynamic: dict[str, Any], bits: int, skipped: bool) -> None:
    said = gptq.module_settings(BASE | {"dynamic": dynamic}, "m.a")
    assert (said.bits, said.skipped) == (bits, skipped)


def test_extra_config_of_autoround_by_name_then_by_regex() -> None:
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32,
              "extra_config": {".*mlp.*": {"bits": 8}, "l.mlp.a": {"bits": 2, "group_size": 64}, "head": {"bits": 16}}}  # fmt: skip
    assert gptq.module_settings(config, "l.mlp.a").bits == 2 and gptq.module_settings(config, "l.mlp.a").group == 64
    assert gptq.module_settings(config, "l.mlp.b").bits == 8 and gptq.module_settings(config, "l.mlp.b").group == 32
    assert gptq.module_settings(config, "head").skipped and gptq.module_settings(config, "l.attn").bits == 4


# ---- the config of an output


def test_a_mixed_checkpoint_gets_rules() -> None:
    modules = {f"l.{i}.q": storage("int4") for i in range(3)} | {
        "l.0.v": storage("int8"),
        "l.1.v": storage("int8"),
        "lm_head": storage("int4"),
    }
    config = gptq.config_out(Target("gptq"), modules, ["l.0.gate", "l.1.gate"], None)
    assert (config["bits"], config["group_size"], config["lm_head"], config["sym"]) == (4, 32, True, True)
    assert list(config["dynamic"]) == [r"-:^(?:l\.0\.gate|l\.1\.gate)$", r"+:^(?:l\.0\.v|l\.1\.v)$"]
    for name, found in modules.items():
        assert gptq.module_settings(config, name).bits == found.grid.bits and not gptq.module_settings(config, name).skipped
    assert gptq.module_settings(config, "l.0.gate").skipped and not gptq.module_settings(config, "l.0.gate_proj").skipped
    assert json.loads(gptq.side_files(config)["quantize_config.json"]) == config
    assert re.fullmatch(r"qformats:.+", config["meta"]["quantizer"][0])


def test_whole_row_modules_fit_any_larger_group() -> None:
    wide, narrow = scheme_of(shape=(64, 1024), group=128), scheme_of(shape=(64, 128), group=128)
    modules = {"a": storage("int4", wide), "b": storage("int4", narrow)}
    assert modules["b"].group is None
    config = gptq.config_out(Target("gptq"), modules, [], None)
    assert config["group_size"] == 128 and "dynamic" not in config


def test_an_original_that_is_no_longer_true_is_not_repeated() -> None:
    sym, asym = storage("int4,group=128,sym"), storage("int4,group=128,asym")
    original = BASE | {"note": "x"}
    assert gptq.config_out(Target("gptq"), {"a": sym}, [], original) == original
    for changed in (asym, storage("int8,group=128,sym"), storage("int4,group=64,sym"), storage("int4,group=128,sym,format=v2")):
        assert "note" not in gptq.config_out(Target("gptq"), {"a": changed}, [], original)
    assert "note" not in gptq.config_out(Target("gptq"), {"a": sym}, [], original | {"dynamic": {"-:a": {}}})
    assert "note" not in gptq.config_out(Target("gptq"), {"a": sym, "lm_head": sym}, [], original)
    auto = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
    assert gptq.config_out(Target("gptq"), {"a": sym}, [], auto)["quant_method"] == "gptq"


def test_one_label_for_a_checkpoint() -> None:
    sym, v2, v1, top = (gptq.storages(Target("gptq", "int4"), scheme_of())[i] for i in range(4))
    assert [s.zero_point for s in (sym, v2, v1, top)] == [8, (0, 15), (1, 15), (1, 16)]
    with pytest.raises(Unsupported, match="gptq-mixed-labels"):
        gptq.config_out(Target("gptq"), {"a": sym, "b": v2}, [], None)
    joined = gptq.harmonize({"a": sym, "b": v1, "c": v2})
    assert [s.zero_point for s in joined.values()] == [8, (0, 15), (0, 15)]
    assert gptq.config_out(Target("gptq"), joined, [], None)["checkpoint_format"] == "gptq_v2"
    assert gptq.harmonize({"a": sym, "b": v1}) == {"a": sym, "b": v1}
    with pytest.raises(Unsupported, match="gptq-mixed-labels"):
        gptq.harmonize({"a": v2, "b": top})


def test_desc_act_only_where_an_order_may_be_kept() -> None:
    plain, ordered = storage("int4"), storage("int4", scheme_of(act_order=True))
    assert gptq.config_out(Target("gptq"), {"a": plain}, [], None)["desc_act"] is False
    assert gptq.config_out(Target("gptq"), {"a": ordered}, [], None)["desc_act"] is True
    assert ordered.group_index and not storage("int4,act-order=no", scheme_of(act_order=True)).group_index


# ---- target options


@pytest.mark.parametrize(
    ("text", "group"),
    [("int4", 32), ("int4,group=128", 128), ("int4,group=-1", None), ("int4,group=256", None), ("int8,group=64", 64)],
)
def test_group_option(text: str, group: int | None) -> None:
    assert storage(text).group == group


def test_floats_get_groups_of_128() -> None:
    floats = Scheme((64, 256), Integer(16, signed=True))
    assert storage("int4", floats).group == 128
    assert storage("int4", Scheme((64, 128), Integer(16, signed=True))).group is None


@pytest.mark.parametrize(
    "text",
    [
        "int9",
        "int5,format=v2",
        "int8,format=marlin",
        "int4,format=marlin,asym",
        "int4,format=marlin,group=16",
        "q4_0",
        "int4,sym,asym",
        "int4,format=v3",
        "int4,group=0",
        "int4,group=-2",
        "int4,group=many",
        "int4,sym=perhaps",
        "int4,color=red",
    ],
)
def test_unknown_types_and_options_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        storage(text)


def test_without_a_type_every_width_is_offered_smallest_first() -> None:
    offered = gptq.storages(Target("gptq"), scheme_of())
    assert [s.type for s in offered] == [f"int{b}" for b in (2, 3, 4, 8) for _ in range(4)]
    assert {s.options["checkpoint_format"] for s in gptq.storages(Target("gptq", None, {"format": "v2"}), scheme_of())} == {"gptq_v2"}


def override_of(dynamic: dict[str, Any], name: str) -> object:
    """What the first rule that matches says, as vLLM and gptqmodel look it up; False for an exclusion."""
    for key, value in dynamic.items():
        if re.match(key.removeprefix("-:").removeprefix("+:"), name):
            return False if key.startswith("-:") else value
    return None


def test_rules_hold_for_the_layers_that_engines_fuse() -> None:
    """Where all parts agree; single matrices are meant as without it, and a layer of parts that differ has no rule."""
    four, eight = storage("int4,group=32,sym"), storage("int8,group=32,sym")
    base, other, moe = "model.layers.0.", "model.layers.1.", "model.layers.2.mlp."
    modules = {f"{base}self_attn.{p}_proj": eight for p in "qkv"} | {f"{base}mlp.{p}_proj": four for p in ("gate", "up", "down")}
    modules |= {f"{other}self_attn.{p}_proj": eight if p == "v" else four for p in "qkvo"}
    modules |= {f"{moe}experts.{e}.{p}_proj": eight for e in range(2) for p in ("gate", "up", "down")}
    modules |= {f"{base}{n}": four for n in ("a", "b", "c", "d", "e", "f")}
    dense = [f"{other}mlp.gate_proj", f"{other}mlp.up_proj", f"{moe}gate"]
    config = gptq.config_out(Target("gptq"), modules, dense, None)
    dynamic, mine = config["dynamic"], {"bits": 8, "group_size": 32}
    assert config["bits"] == 4 and len(dynamic) == 2
    assert override_of(dynamic, f"{base}self_attn.qkv_proj") == mine == override_of(dynamic, f"{moe}experts")
    assert override_of(dynamic, f"{other}mlp.gate_up_proj") is False
    assert override_of(dynamic, f"{base}mlp.gate_up_proj") is None is override_of(dynamic, f"{other}self_attn.qkv_proj")
    for name, held in modules.items():
        assert override_of(dynamic, name) == (mine if held is eight else None)
        assert gptq.module_settings(config, name).bits == (8 if held is eight else 4)
    assert all(override_of(dynamic, name) is False for name in dense)
    assert override_of(dynamic, f"{moe}experts.0") is None and not any("experts.0.gate_up" in key for key in dynamic)

"""What is rounded while a model runs: static scales of the inputs and scales of the cache go along, or are named as dropped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensors, array, converted, edit, edit_json, load, planned, ready

CT, FP8, MODELOPT = "compressed-tensors/fp8-tensor-kv", "fp8/tensor-static", "modelopt/fp8"
LEAVES = {"compressed-tensors": "input_scale", "modelopt": "input_scale", "fp8": "activation_scale"}


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return found


def scales(tensors: Tensors, leaf: str) -> dict[str, bytes]:
    return {name.removesuffix(f".{leaf}"): data for name, (_, _, data) in tensors.items() if name.endswith(f".{leaf}")}


def inputs_of(config: dict[str, Any]) -> Any:
    """The last group's inputs as written (the first may be of weights too small for blocks); the real tests let the owner read them."""
    return SimpleNamespace(**list(config["config_groups"].values())[-1]["input_activations"])


@pytest.mark.parametrize(("path", "to"), [(CT, "fp8"), (CT, "modelopt"), (FP8, "compressed-tensors"), (FP8, "modelopt"),
                                          (MODELOPT, "compressed-tensors"), (MODELOPT, "fp8")])  # fmt: skip
def test_static_scales_go_along_under_their_name_there(path: str, to: str, tmp_path: Path) -> None:
    source = ready(path, tmp_path)
    plan = converted(source, tmp_path / "out", to)
    before, after = load(source / "model.safetensors"), load(tmp_path / "out" / "model.safetensors")
    mine, theirs = scales(before, LEAVES[path.split("/")[0]]), scales(after, LEAVES[to])
    assert mine and mine == theirs and not plan.dropped and not plan.warnings
    assert {tuple(shape) for name, (_, shape, _) in after.items() if name.endswith(LEAVES[to])} == {(1,) if to.startswith("comp") else ()}
    cache = {name: entry for name, entry in before.items() if name.endswith(("k_scale", "v_scale"))}
    assert all(after[name] == entry for name, entry in cache.items())
    config = config_of(tmp_path / "out")
    if to == "fp8":
        assert config["activation_scheme"] == "static"
        return
    assert (config["kv_cache_scheme"] is not None if cache else not config.get("kv_cache_scheme"))
    if to == "modelopt":
        assert config["quant_algo"] == "FP8"
        side = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
        assert side["quantization"]["kv_cache_quant_algo"] == ("FP8" if cache else None)
    else:
        inputs = inputs_of(config)
        assert (inputs.num_bits, inputs.type, inputs.strategy, inputs.dynamic) == (8, "float", "tensor", False)


@pytest.mark.parametrize("path", [CT, FP8, MODELOPT])
def test_there_and_back_scales_and_config_are_as_they_were(path: str, tmp_path: Path) -> None:
    source, form = ready(path, tmp_path), path.split("/")[0]
    other = "modelopt" if form == "fp8" else "fp8"
    converted(source, tmp_path / "there", other)
    converted(tmp_path / "there", tmp_path / "back", form)
    assert load(tmp_path / "back" / "model.safetensors") == load(source / "model.safetensors")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_nvfp4_scales_of_inputs_divide_in_compressed_tensors(tmp_path: Path) -> None:
    source = ready("modelopt/nvfp4", tmp_path)
    edit(source, lambda tensors: [tensors.update({name: (d, s, np.float32(0.25).tobytes())}) for name, (d, s, _) in list(tensors.items())
                                  if name.endswith("q_proj.input_scale")])  # fmt: skip
    plan = converted(source, tmp_path / "ct", "compressed-tensors")
    before, after = load(source / "model.safetensors"), load(tmp_path / "ct" / "model.safetensors")
    kinds = {job.name: job.kind for job in plan.jobs if job.map.kind == "extra"}
    found = {name: float(array(before, name)) for name in before if name.endswith("input_scale")}
    assert found and not plan.dropped and not plan.warnings and not any(name.endswith("input_scale") for name in after)
    for name, value in found.items():
        there = name.replace("input_scale", "input_global_scale")
        assert after[there][1] == [1] and array(after, there)[0] == np.float32(1 / value)
        assert kinds[there] == ("exact" if float(np.float32(1 / value)) * value == 1 else "codes-exact")
    assert (inputs := inputs_of(config_of(tmp_path / "ct"))).dynamic == "local" and inputs.num_bits == 4 and inputs.group_size == 16
    converted(tmp_path / "ct", tmp_path / "back", "modelopt")
    assert load(tmp_path / "back" / "model.safetensors") == before


@pytest.mark.parametrize(("path", "strategy"), [("fbgemm_fp8/rows", "token"), ("fp8/block", "group"), ("fp8/mxfp8", "group")])
def test_dynamic_schemes_go_along(path: str, strategy: str, tmp_path: Path) -> None:
    plan = converted(ready(path, tmp_path), tmp_path / "out", "compressed-tensors")
    inputs = inputs_of(config_of(tmp_path / "out"))
    assert (inputs.strategy, inputs.dynamic, inputs.num_bits, inputs.type) == (strategy, True, 8, "float") and not plan.warnings


@pytest.mark.parametrize(
    ("path", "to", "scheme"),
    [(CT, "compressed-tensors:int8", "fp8 (static, per tensor)"), (CT, "hf", "fp8 (static, per tensor)"),
     (CT, "fbgemm_fp8", "fp8 (static, per tensor)"), ("compressed-tensors/w8a8", "quanto", "int8 (dynamic, per token)"),
     ("compressed-tensors/w8a8", "hf", "int8 (dynamic, per token)"), ("fp8/block", "hf", "fp8 (dynamic, per group)"),
     ("fbgemm_fp8/rows", "quanto", "fp8 (dynamic, per token)"), ("bitnet/bitlinear", "hf", "int8 (dynamic, per token)"),
     ("modelopt/nvfp4", "hf", "nvfp4 (static, per tensor)")],
)  # fmt: skip
def test_what_a_format_has_no_words_for_is_named(path: str, to: str, scheme: str, tmp_path: Path) -> None:
    source = ready(path, tmp_path)
    plan = planned(source, to, allow_requantize=True)
    with plan.checkpoint:
        assert any(scheme in text and "the weights alone" in text for text in plan.warnings), plan.warnings
        gone = {name for name in load(source / "model.safetensors") if name.endswith((".input_scale", ".activation_scale"))}
        assert gone <= plan.dropped.keys() and not any(job.map.leaf == "input_scale" and job.map.kind == "extra" for job in plan.jobs)


def test_one_scale_for_keys_and_values_is_no_weight(tmp_path: Path) -> None:
    """``kv_scale`` of vLLM's first FP8 checkpoints: kept in the format, named elsewhere."""
    source, name = ready(FP8, tmp_path), "model.layers.0.self_attn.kv_scale"
    edit(source, lambda tensors: tensors.update({name: ("F32", [1], np.float32(0.5).tobytes())}))
    for to, kept in (("fp8", True), ("hf", False), ("compressed-tensors", False)):
        plan = planned(source, to)
        with plan.checkpoint:
            assert (name in {job.name for job in plan.jobs}, name in plan.dropped) == (kept, not kept)


def test_weights_alone_say_nothing(tmp_path: Path) -> None:
    for path in ("compressed-tensors/w4-sym", "gptq/4b-g32-sym"):
        plan = planned(ready(path, tmp_path), "hf")
        with plan.checkpoint:
            assert not any("weights alone" in text for text in plan.warnings)


def test_a_preset_scheme_has_its_inputs(tmp_path: Path) -> None:
    source = ready(CT, tmp_path)
    edit_json(source / "config.json", lambda c: c["quantization_config"].update(config_groups={"FP8": ["Linear"]}))
    converted(source, tmp_path / "out", "fp8")
    assert config_of(tmp_path / "out")["activation_scheme"] == "static"


def test_modelopt_has_no_static_scale_to_claim_where_none_is_carried(tmp_path: Path) -> None:
    """Its algorithm FP8 wants ``input_scale`` beside every weight: without one a tensor's scale becomes its rows', for inputs measured as
    the model runs, and back the one it was; where the algorithm is named, the config does not say that inputs are static."""
    source = ready(FP8, tmp_path)
    edit(source, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("activation_scale")])
    edit_json(source / "config.json", lambda config: config["quantization_config"].update(activation_scheme="dynamic"))
    plan = converted(source, tmp_path / "out", "modelopt")
    assert all(job.kind == "exact" for job in plan.jobs if job.storage is not None)
    assert config_of(tmp_path / "out")["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    converted(tmp_path / "out", tmp_path / "back", "fp8")
    assert load(tmp_path / "back" / "model.safetensors") == load(source / "model.safetensors")
    converted(source, tmp_path / "named", "modelopt:fp8,scale=tensor")
    config = config_of(tmp_path / "named")
    assert config["quant_algo"] == "FP8" and all("input_activations" not in group for group in config["config_groups"].values())

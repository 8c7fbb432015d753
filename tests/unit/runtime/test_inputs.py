"""Inputs of linear layers are rounded as each format publishes it: every rule against a statement of its own in numpy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import ready

from qformats.errors import QFormatError
from qformats.formats import modelopt
from qformats.formats.protocol import Inputs
from qformats.runtime.inputs import round_inputs, rounded
from qformats.runtime.loader import load_model

pytest.importorskip("transformers")
torch.set_num_threads(1)
Array = np.ndarray[Any, Any]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def sample() -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64) * torch.logspace(-3, 2, 5).view(1, 5, 1)
    x[0, 0] = 0
    x[1, 2, 7] = 40
    return x


def codes_of(grid: str) -> Array:
    """The numbers of 8 bits or fewer, from their fields; those that are not finite left out."""
    exponent, mantissa = {"e4m3fn": (4, 3), "e5m2": (5, 2), "e2m1": (2, 1), "e2m3": (2, 3), "e3m2": (3, 2)}[grid]
    bias, made = 2 ** (exponent - 1) - 1, []
    for code in range(2 ** (exponent + mantissa)):
        e, m = code >> mantissa, code & (2**mantissa - 1)
        made.append(m * 2.0 ** (1 - bias - mantissa) if e == 0 else (1 + m / 2**mantissa) * 2.0 ** (e - bias))
    last = {"e4m3fn": 1, "e5m2": 4}.get(grid, 0)
    return np.array(made[: len(made) - last])


def nearest(values: Array, grid: str) -> Array:
    """By search: the nearest number, of two as near the one with the even code."""
    numbers = codes_of(grid)
    size = np.minimum(np.abs(values), numbers[-1])
    above = np.searchsorted(numbers, size)
    below = np.maximum(above - 1, 0)
    near, far = size - numbers[below], numbers[above] - size
    pick = np.where(near < far, below, np.where(near > far, above, np.where(below % 2 == 0, below, above)))
    return np.copysign(numbers[pick], values)


def stated(x: torch.Tensor, scale: Array, grid: str, highest: int = 127) -> Array:
    values = x.double().numpy() / scale
    codes = np.clip(np.rint(values), -highest - 1, highest) if grid.startswith("int") else nearest(values, grid)
    return np.asarray(codes * scale)


def f32(values: Array) -> Array:
    return values.astype(np.float32).astype(np.float64)


def amax(x: torch.Tensor) -> Array:
    return np.abs(x.double().numpy()).max(-1, keepdims=True)


def check(rule: Inputs, wanted: Array, x: torch.Tensor) -> None:
    found = rounded(x, rule)
    assert found.dtype == torch.float32 and found.shape == x.shape
    apart = np.abs(found.double().numpy() - wanted)
    same = (apart <= 1e-5 * np.abs(wanted) + 1e-12).mean()
    assert same > 0.98, float(same)  # ties fall either way in float32
    assert (apart <= np.abs(wanted).max(-1, keepdims=True) * (1 / 100 if rule.grid == "int8" else 0.34) + 1e-9).all()


def some(scale: Array) -> Array:
    return np.where(scale == 0, 1.0, scale)


@pytest.mark.parametrize(("span", "rule"), [(127.5, Inputs("int8", span=127.5)), (127.0, Inputs("int8", span=127.0, least=1e-5 / 127))])
def test_integers_for_each_token(span: float, rule: Inputs) -> None:
    x = sample()
    check(rule, stated(x, np.maximum(some(f32(amax(x) / span)), rule.least), "int8"), x)


def test_integers_with_a_zero_point() -> None:
    x = sample()
    low, high = (np.asarray(v) for v in (x.amin(-1, keepdim=True).clamp(max=0).double(), x.amax(-1, keepdim=True).clamp(min=0).double()))
    scale = some(f32((high - low) / 255))
    zero = np.rint(np.clip(-128 - low / scale, -128, 127))
    codes = np.clip(np.rint(x.double().numpy() / scale + zero), -128, 127)
    check(Inputs("int8", symmetric=False, span=255.0), (codes - zero) * scale, x)
    codes = np.clip(np.rint(x.double().numpy() / 0.25 + 3), -128, 127)
    check(Inputs("int8", "tensor", scale=0.25, zero=3.0), (codes - 3) * 0.25, x)


def test_integers_for_each_group_and_for_the_tensor() -> None:
    x = sample()
    groups = x.unflatten(-1, (2, 32))
    wanted = stated(groups, some(f32(amax(groups) / 7.5)), "int4", 7).reshape(x.shape)
    check(Inputs("int4", "group", 32, span=7.5, highest=7), wanted, x)
    check(Inputs("int8", "tensor", span=127.5), stated(x, f32(amax(x).max() / 127.5), "int8"), x)


def test_a_last_group_may_be_short() -> None:
    x = sample()[..., :40]
    first, last = x[..., :32], x[..., 32:]
    wanted = np.concatenate([stated(part, some(f32(amax(part) / 448)), "e4m3fn") for part in (first, last)], -1)
    check(Inputs("e4m3fn", "group", 32, span=448.0), wanted, x)


@pytest.mark.parametrize(("grid", "span"), [("e4m3fn", 448.0), ("e5m2", 57344.0)])
def test_fp8_dynamic_bounded_and_static(grid: str, span: float) -> None:
    x = sample()
    check(Inputs(grid, span=span), stated(x, some(f32(amax(x) / span)), grid), x)
    check(Inputs(grid, span=span, most=20.0), stated(x, some(f32(np.minimum(amax(x), 20) / span)), grid), x)
    check(Inputs(grid, "tensor", scale=0.015625), stated(x, np.float64(0.015625), grid), x)


@pytest.mark.parametrize("grid", ["e4m3fn", "e2m1", "e2m3", "e3m2"])
@pytest.mark.parametrize("power", ["floor", "even", "ceil"])
def test_powers_of_two_for_each_group(grid: str, power: str) -> None:
    x = sample()
    groups = x.unflatten(-1, (2, 32))
    largest, numbers = some(amax(groups)), codes_of(grid)
    top = np.floor(np.log2(numbers[-1]))
    if power == "ceil":
        exponent = np.ceil(np.log2(largest / numbers[-1]))
    else:
        digits = 3 if grid == "e2m3" else 1
        bumped = largest / 2 ** np.floor(np.log2(largest)) + (2.0 ** (-digits - 1) if power == "even" else 0) >= 2
        exponent = np.floor(np.log2(largest)) + bumped - top
    wanted = stated(groups, np.where(amax(groups) == 0, 1.0, 2.0**exponent), grid).reshape(x.shape)
    check(Inputs(grid, "group", 32, scale_grid=power), wanted, x)


@pytest.mark.parametrize("inverse", [False, True])
def test_nvfp4_under_a_static_factor(inverse: bool) -> None:
    x = sample()
    groups = x.unflatten(-1, (4, 16))
    factor = 0.01
    small = nearest(f32(amax(groups) / 6) / factor, "e4m3fn")
    wanted = stated(groups, some(small) * factor, "e2m1").reshape(x.shape)
    check(Inputs("e2m1", "group", 16, 1 / factor if inverse else factor, span=6.0, scale_grid="e4m3fn", inverse=inverse), wanted, x)


def test_columns_with_outliers_stay() -> None:
    x = sample() / sample().abs().amax(-1, keepdim=True).clamp(min=1e-9)
    x[1, 2, 7], x[0, 3, 9] = 6.0, -11.0
    half = x.half().double().numpy()
    kept = (np.abs(half) >= 6).reshape(-1, 64).any(0)
    usual = np.where(np.abs(half) >= 6, 0, half)
    scale = some(np.abs(usual).max(-1, keepdims=True) / 127)
    wanted = np.where(kept, x.double().numpy(), np.clip(np.rint(half / scale), -128, 127) * scale)
    assert 0 < kept.sum() < 64
    check(Inputs("int8", outliers=6.0, steps="float16"), wanted, x)


def test_steps_in_the_dtype_of_the_inputs() -> None:
    x = sample().bfloat16()
    scale = (x.abs().amax(-1, keepdim=True) / 127.5).where(x.abs().amax(-1, keepdim=True) > 0, torch.ones((), dtype=torch.bfloat16))
    wanted = ((x / scale).clamp(-128, 127).round() * scale).float()
    assert torch.equal(rounded(x, Inputs("int8", span=127.5, steps="")), wanted)


RUN: dict[str, Callable[[dict[str, Any]], bool]] = {
    "compressed-tensors/w8a8": lambda r: r["grid"] == "int8" and r["span"] == 127.5,
    "compressed-tensors/fp8-tensor-kv": lambda r: r["grid"] == "e4m3fn" and r["scale"] is not None,
    "bitsandbytes/int8": lambda r: r["outliers"] == 6.0,
    "fbgemm_fp8/rows": lambda r: r["most"] == 1200.0,
    "fp8/block": lambda r: r["per"] == "group" and r["span"] == 448.0,
    "fp8/experts-fp4": lambda r: r["scale_grid"] == "ceil",
    "modelopt/nvfp4": lambda r: r["grid"] == "e2m1" and r["scale"] is not None,
    "torchao/int8-dynamic": lambda r: r["least"] == 2.0**-23,
    "quanto/mixed-bf16": lambda r: r["grid"] == "int8" and r["per"] == "tensor",
    "bitnet/autobitlinear": lambda r: r["span"] == 127.0,
}


@pytest.mark.parametrize("case", RUN)
def test_published_by_default_and_floats_on_demand(case: str, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    model, plain = load_model(source, dtype=torch.float32), load_model(source, dtype=torch.float32, activations="float")
    rules = [json.loads(text) for m in model.modules() for _, _, text in getattr(m, "input_rules", ()) if text]
    assert rules and all(RUN[case](rule) for rule in rules)
    assert not any(getattr(m, "input_rules", ()) for m in plain.modules())
    ids = IDS % model.config.get_text_config().vocab_size
    with torch.no_grad():
        published, floats = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert not torch.equal(published, floats)
    assert torch.allclose(published, floats, atol=0.35 * float(floats.abs().max()))


def test_a_layer_rounds_and_then_multiplies_exactly(tmp_path: Path) -> None:
    model = load_model(ready("compressed-tensors/w8a8", tmp_path), dtype=torch.float32)
    layer, x = model.model.layers[0].self_attn.q_proj, sample()
    ((_, _, rule),) = layer.input_rules
    wanted = torch.nn.functional.linear(round_inputs(x, rule), layer.dequantize(torch.float32), layer.bias)
    with torch.no_grad():
        assert torch.allclose(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_outputs_are_rounded_where_quanto_says_so(tmp_path: Path) -> None:
    layer = load_model(ready("quanto/mixed-bf16", tmp_path), dtype=torch.float32).model.layers[0].self_attn.q_proj
    ((_, _, rule),) = layer.output_rules
    with torch.no_grad():
        codes = layer(sample()[..., : layer.in_features]) / json.loads(rule)["scale"]
    assert torch.allclose(codes, codes.round(), atol=1e-3) and codes.abs().max() <= 128.001


def test_the_gradient_goes_straight_through(tmp_path: Path) -> None:
    layer = load_model(ready("compressed-tensors/w8a8", tmp_path), dtype=torch.float32).model.layers[0].self_attn.q_proj
    x = sample().requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.dequantize(torch.float32).sum(0).expand_as(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["compressed-tensors/w8a8", "bitsandbytes/int8", "modelopt/nvfp4"])
def test_it_compiles_without_a_break(case: str, tmp_path: Path) -> None:
    model = load_model(ready(case, tmp_path), dtype=torch.float32)
    ids = IDS % model.config.vocab_size
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits, atol=1e-4)


def changed_config(source: Path, **values: Any) -> Path:
    path = source / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(values)
    path.write_text(json.dumps(config))
    return source


def test_rules_that_are_not_known_are_refused(tmp_path: Path) -> None:
    source = ready("compressed-tensors/w8a8", tmp_path)
    groups = json.loads((source / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["input_activations"].update(dynamic=False)
    changed_config(source, config_groups=groups)
    with pytest.raises(QFormatError) as caught:
        load_model(source)
    assert caught.value.code == "input-rule" and "float" in str(caught.value.hint)
    load_model(source, activations="float")


def test_bad_thresholds_are_refused(tmp_path: Path) -> None:
    for case, value in (("bitsandbytes/int8", {"llm_int8_threshold": -1}), ("fbgemm_fp8/rows", {"activation_scale_ub": "x"})):
        source = changed_config(ready(case, tmp_path / case), **value)
        with pytest.raises(QFormatError) as caught:
            load_model(source)
        assert caught.value.code == "config-value"


def test_a_factor_of_the_input_is_applied_and_its_rounding_is_said_to_be_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(ready("modelopt/nvfp4", tmp_path), tmp_path / "factor"))
    before = load_model(source, dtype=torch.float32).model.layers[0].mlp
    held = load_file(source / "model.safetensors")
    factor = torch.linspace(0.5, 2, before.up_proj.in_features)
    save_file({**held, "model.layers.0.mlp.up_proj.pre_quant_scale": factor}, source / "model.safetensors")
    modelopt._say_once.cache_clear()
    with pytest.warns(UserWarning, match="pre_quant_scale multiplies first are not rounded"):
        after = load_model(source, dtype=torch.float32).model.layers[0].mlp
    assert after.up_proj.input_rules == () and after.gate_proj.input_rules == before.gate_proj.input_rules != ()
    x = torch.randn(2, len(factor), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(after.up_proj(x), (x * factor) @ before.up_proj.dequantize().t(), atol=1e-5)

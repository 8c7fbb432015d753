"""What every format must refuse, by its code: companions missing, values that are no scales, configs that say other than the tensors.

``test_sweep`` changes parts blindly; here each case has its reason, and a control that the same fixture unchanged converts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensors, array, digest, edit, edit_json, names_in, put, ready
from test_sweep import outcome

Change = Callable[[Path], Any]
DOWN, QUERY, CACHE = "model.layers.0.mlp.down_proj.", "model.layers.0.self_attn.q_proj.", "model.layers.0.self_attn."
NAN, INFINITE = float("nan"), float("inf")


def drop(*names: str) -> Change:
    return lambda source: edit(source, lambda tensors: [tensors.pop(name) for name in names])


def last(name: str, value: float, dtype: str = "") -> Change:
    """The last number, or byte for the types that numpy has not, becomes ``value``."""

    def change(tensors: Tensors) -> None:
        word, shape, data = tensors[name]
        if word == "BF16":
            half = int(np.float32(value).view(np.uint32)) >> 16
            tensors[name] = (word, shape, data[:-2] + half.to_bytes(2, "little"))
        elif word.startswith("F8") or dtype == "byte":
            tensors[name] = (word, shape, data[:-1] + bytes([int(value)]))
        else:
            values = array(tensors, name)
            values.reshape(-1)[-1] = value
            put(tensors, name, values)

    return lambda source: edit(source, change)


def turned(name: str) -> Change:
    return lambda source: edit(source, lambda t: t.update({name: (t[name][0], t[name][1][::-1], t[name][2])}))


def blob(name: str, **values: Any) -> Change:
    """Keys of the JSON in a tensor of bytes."""

    def change(tensors: Tensors) -> None:
        held = {**json.loads(tensors[name][2]), **values}
        data = json.dumps({key: value for key, value in held.items() if value is not None}).encode()
        tensors[name] = ("U8", [len(data)], data)

    return lambda source: edit(source, change)


def said(**values: Any) -> Change:
    """Keys of the quantization config; of that of MLX in both its places."""

    def change(settings: dict[str, Any]) -> None:
        for key in ("quantization_config", "quantization"):
            if key in settings:
                settings[key].update(values)

    return lambda source: edit_json(source / "config.json", change)


def weights(**values: Any) -> Change:
    """Keys of the weights of the first config group of compressed-tensors."""
    return lambda source: edit_json(
        source / "config.json", lambda s: s["quantization_config"]["config_groups"]["group_0"]["weights"].update(values)
    )


def layer(name: str, **values: Any) -> Change:
    return lambda source: edit_json(
        source / "config.json", lambda s: s["quantization_config"]["quantized_layers"][name].update(values)
    )


def both(*changes: Change) -> Change:
    return lambda source: [change(source) for change in changes]


NF4, FP4 = f"{DOWN}weight.quant_state.bitsandbytes__nf4", f"{DOWN}weight.quant_state.bitsandbytes__fp4"
EXPERTS = "model.layers.0.mlp.experts."
CT, AO = "compressed-tensors/", "torchao/"
CASES: list[tuple[str, str, Change, str]] = [
    ("bitsandbytes/nf4", "no absmax", drop(f"{DOWN}weight.absmax"), "missing-absmax"),
    ("bitsandbytes/nf4", "no map", drop(f"{DOWN}weight.quant_map"), "missing-quant_map"),
    ("bitsandbytes/nf4", "no state", drop(NF4), "missing-quant-state"),
    ("bitsandbytes/nf4", "absmax infinite", last(f"{DOWN}weight.absmax", INFINITE), "not-finite"),
    ("bitsandbytes/nf4", "map of NaN", last(f"{DOWN}weight.quant_map", NAN), "quant-map"),
    ("bitsandbytes/nf4", "another blocksize", blob(NF4, blocksize=128), "wrong-shape"),
    ("bitsandbytes/nf4", "blocksize 0", blob(NF4, blocksize=0), "quant-state"),
    ("bitsandbytes/nf4", "another shape", blob(NF4, shape=[96, 128]), "wrong-shape"),
    ("bitsandbytes/nf4", "says fp4", blob(NF4, quant_type="fp4"), "quant-state"),
    ("bitsandbytes/fp4-double", "no nested scales", drop(f"{DOWN}weight.nested_absmax"), "missing-nested_absmax"),
    ("bitsandbytes/fp4-double", "no nested map", drop(f"{DOWN}weight.nested_quant_map"), "missing-nested_quant_map"),
    ("bitsandbytes/fp4-double", "nested scale NaN", last(f"{DOWN}weight.nested_absmax", NAN), "not-finite"),
    ("bitsandbytes/fp4-double", "nested map infinite", last(f"{DOWN}weight.nested_quant_map", INFINITE), "quant-map"),
    ("bitsandbytes/fp4-double", "nested offset NaN", blob(FP4, nested_offset=NAN), "quant-state"),
    ("bitsandbytes/fp4-double", "no nested offset", blob(FP4, nested_offset=None), "quant-state"),
    ("bitsandbytes/int8", "no SCB", drop(f"{DOWN}SCB"), "missing-SCB"),
    ("bitsandbytes/int8", "SCB NaN", last(f"{DOWN}SCB", NAN), "not-finite"),
    ("hqq/4b-g32-ax1-f16", "no scale", drop(f"{DOWN}scale"), "missing-scale"),
    ("hqq/4b-g32-ax1-f16", "no zero", drop(f"{DOWN}zero"), "missing-zero"),
    ("hqq/4b-g32-ax1-f16", "scale infinite", last(f"{DOWN}scale", INFINITE), "not-finite"),
    ("hqq/4b-g32-ax1-f16", "zero NaN", last(f"{DOWN}zero", NAN), "not-finite"),
    ("hqq/4b-g32-ax1-f16", "another group", last(f"{DOWN}group_size", 64), "wrong-shape"),
    ("hqq/4b-g32-ax1-f16", "another axis", last(f"{DOWN}axis", 0), "wrong-shape"),
    ("hqq/4b-g32-ax1-f16", "scale (1, 160)", turned(f"{DOWN}scale"), "wrong-shape"),
    ("quanto/qint4-f16", "no shift", drop(f"{DOWN}weight._shift"), "missing-shift"),
    ("quanto/qint4-f16", "shift infinite", last(f"{DOWN}weight._shift", INFINITE), "not-finite"),
    ("quanto/qint4-f16", "scale NaN", last(f"{DOWN}weight._scale", NAN), "not-finite"),
    ("quanto/qint4-f16", "input scale NaN", last(f"{DOWN}input_scale", NAN), "not-finite"),
    ("eetq/int8", "no scales", drop(f"{DOWN}weight_scales"), "missing-weight-scales"),
    ("eetq/int8", "scale infinite", last(f"{DOWN}weight_scales", INFINITE), "not-finite"),
    ("fbgemm_fp8/rows", "scale NaN", last(f"{DOWN}weight_scale", NAN), "not-finite"),
    ("fbgemm_fp8/rows", "scale (1, N)", turned(f"{DOWN}weight_scale"), "wrong-shape"),
    ("fbgemm_fp8/rows", "bound of the input NaN", last(f"{DOWN}input_scale_ub", NAN), "not-finite"),
    ("bitnet/bitlinear", "no scale", drop(f"{DOWN}weight_scale"), "missing-weight-scale"),
    ("bitnet/bitlinear", "scale 0, which divides", last(f"{DOWN}weight_scale", 0), "not-finite"),
    ("bitnet/bitlinear", "scale infinite", last(f"{DOWN}weight_scale", INFINITE), "not-finite"),
    ("mlx/4b-g64", "no biases", drop(f"{DOWN}biases"), "missing-biases"),
    ("mlx/4b-g64", "no scales", drop(f"{DOWN}scales", f"{DOWN}biases"), "missing-scales"),
    ("mlx/4b-g64", "bias NaN", last(f"{DOWN}biases", NAN), "not-finite"),
    ("mlx/4b-g64", "another group", said(group_size=32), "wrong-shape"),
    ("mlx/4b-g64", "other bits", said(bits=8), "wrong-shape"),
    ("mlx/mixed-bf16", "scale 255 of mxfp4", last(f"{DOWN}scales", 127, "byte"), "not-finite"),
    ("aqlm/1x10-o2", "a code beyond the codebook", last(f"{DOWN}codes", 1024), "codes-range"),
    ("aqlm/1x10-o2", "codebook NaN", last(f"{DOWN}codebooks", NAN), "not-finite"),
    ("aqlm/1x10-o2", "scale infinite", last(f"{DOWN}scales", INFINITE), "not-finite"),
    ("aqlm/1x10-o2", "another codebook", said(nbits_per_codebook=9), "config-disagrees"),
    ("aqlm/2x8", "another group", said(in_group_size=4), "config-disagrees"),
    ("gemma/mixed", "no scale", drop(f"{DOWN}weight_scale"), "missing-weight-scale"),
    ("gemma/mixed", "scale NaN", last(f"{DOWN}weight_scale", NAN), "not-finite"),
    ("gemma/mixed", "step of the input infinite", last(f"{DOWN}input_activation_scale", INFINITE), "not-finite"),
    ("gemma/mixed", "other bits", said(num_bits=8), "wrong-dtype"),
    ("mxfp4", "scale 255", last(f"{EXPERTS}down_proj_scales", 255), "not-finite"),
    ("mxfp4", "no scales", drop(f"{EXPERTS}down_proj_scales"), "missing-scales"),
    ("modelopt/nvfp4", "scale NaN", last(f"{DOWN}weight_scale", 0x7F), "not-finite"),
    ("modelopt/nvfp4", "global scale infinite", last(f"{DOWN}weight_scale_2", INFINITE), "not-finite"),
    ("modelopt/nvfp4", "input scale NaN", last(f"{DOWN}input_scale", NAN), "not-finite"),
    ("modelopt/nvfp4", "no global scale", drop(f"{DOWN}weight_scale_2"), "missing-weight-scale-2"),
    ("modelopt/nvfp4", "another algorithm", said(quant_algo="FP8"), "config-disagrees"),
    ("modelopt/fp8", "cache scale NaN", last(f"{CACHE}k_proj.k_scale", NAN), "not-finite"),
    ("modelopt/mixed", "another group", layer(DOWN[:-1], group_size=64), "wrong-shape"),
    ("modelopt/mixed", "one scale a tensor as blocks", layer(f"{CACHE}k_proj", quant_algo="FP8_PB_WO"), "wrong-shape"),
    ("fp8/block", "blocks that divide as evenly", said(weight_block_size=[32, 48]), "wrong-shape"),
    ("fp8/block", "no blocks", said(weight_block_size=None), "wrong-shape"),
    ("fp8/block", "blocks turned", turned(f"{DOWN}weight_scale_inv"), "wrong-shape"),
    ("fp8/block", "scale infinite", last(f"{DOWN}weight_scale_inv", INFINITE), "not-finite"),
    ("fp8/mxfp8", "scale 255", last(f"{DOWN}weight_scale_inv", 255), "not-finite"),
    ("fp8/experts-fp4", "scale 255", last(f"{EXPERTS}0.down_proj.scale", 255), "not-finite"),
    ("fp8/tensor-static", "input scale infinite", last(f"{DOWN}activation_scale", INFINITE), "not-finite"),
    (CT + "actorder", "no index", drop(f"{DOWN}weight_g_idx"), "missing-weight-g-idx"),
    (CT + "actorder", "no index under another word", both(drop(f"{DOWN}weight_g_idx"), weights(actorder=True)), "missing-weight-g-idx"),
    (CT + "actorder", "an order that is none", weights(actorder="sorted"), "config-value"),
    (CT + "actorder", "an index beyond the groups", last(f"{DOWN}weight_g_idx", 3), "g-idx-range"),
    (CT + "w4-sym", "another group", weights(group_size=16), "wrong-shape"),
    (CT + "w4-asym", "no zero points", drop(f"{DOWN}weight_zero_point"), "missing-weight-zero-point"),
    (CT + "w4-asym", "zero points turned", turned(f"{DOWN}weight_zero_point"), "wrong-shape"),
    (CT + "w8-channel", "no shape", drop(f"{DOWN}weight_shape"), "missing-weight-shape"),
    (CT + "fp8-block", "blocks that divide as evenly", weights(block_structure=[64, 32]), "wrong-shape"),
    (CT + "fp8-tensor-kv", "cache scale NaN", last(f"{CACHE}k_scale", NAN), "not-finite"),
    (CT + "fp8-tensor-kv", "input scale infinite", last(f"{DOWN}input_scale", INFINITE), "not-finite"),
    (CT + "nvfp4", "scale NaN", last(f"{DOWN}weight_scale", 0xFF), "scale-value"),
    (CT + "nvfp4", "global scale 0, which divides", last(f"{DOWN}weight_global_scale", 0), "scale-value"),
    (CT + "nvfp4", "global scale infinite", last(f"{DOWN}weight_global_scale", INFINITE), "scale-value"),
    (CT + "mxfp4", "scale 255", last(f"{DOWN}weight_scale", 255), "scale-value"),
    (CT + "sparse24-fp8", "no bit mask", drop(f"{DOWN}bitmask"), "missing-bitmask"),
    (AO + "nvfp4", "scales turned", turned(f"{DOWN}_weight_scale"), "wrong-shape"),
    (AO + "nvfp4", "scale NaN", last(f"{DOWN}_weight_scale", 0x7F), "scale-not-finite"),
    (AO + "nvfp4", "global scale NaN", last(f"{DOWN}_weight_per_tensor_scale", NAN), "scale-not-finite"),
    (AO + "intx-mixed", "a code beyond its type", last(f"{DOWN}_weight_qdata", 100), "codes-range"),
    (AO + "intx-mixed", "no zero points", drop(f"{DOWN}_weight_zero_point"), "torchao-parts"),
    (AO + "int8", "scale infinite", last(f"{DOWN}_weight_scale", INFINITE), "scale-not-finite"),
    (AO + "int8", "zero points turned", turned(f"{DOWN}_weight_zero_point"), "wrong-shape"),
    ("gptq/4b-g32-act", "no index", drop(*(f"{CACHE}{name}_proj.g_idx" for name in "qkv")), "missing-g-idx"),
    ("awq/fast-g64", "a zero point NaN", lambda source: edit(source, lambda t: put(t, f"{DOWN}qzeros", array(t, f"{DOWN}qzeros") * NAN)),
     "padding"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "change", "code"), [(p, c, e) for p, _, c, e in CASES], ids=[f"{p}: {what}" for p, what, _, _ in CASES])
def test_it_is_refused_by_its_code(path: str, change: Change, code: str, tmp_path: Path) -> None:
    source = ready(path, tmp_path)
    change(source)
    before = digest(source)
    assert outcome(source, tmp_path / "out") == code
    assert digest(source) == before and names_in(tmp_path) == [source.name]


@pytest.mark.parametrize("path", sorted({case[0] for case in CASES}))
def test_the_same_fixture_as_it_is_converts(path: str, tmp_path: Path) -> None:
    assert outcome(ready(path, tmp_path), tmp_path / "out") == ""


@pytest.mark.parametrize("word", ["weight", "static", None, False])
def test_an_order_of_the_calibration_alone_has_no_index(word: object, tmp_path: Path) -> None:
    """``actorder: weight`` stores none: columns are in order, and so are the groups of an index that is left out."""
    source = ready("compressed-tensors/actorder", tmp_path)
    both(weights(actorder=word), drop(f"{DOWN}weight_g_idx"))(source)
    assert outcome(source, tmp_path / "out") == ""

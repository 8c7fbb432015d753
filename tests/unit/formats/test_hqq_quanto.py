"""HQQ and Quanto against their owners' values: read bit for bit in any row range, written back to the same bytes, refused when broken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qformats import registry
from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, QFormatError, Unsafe, Unsupported
from qformats.formats.protocol import Match, Module, Target
from qformats.formats.slabs import Slabs
from qformats.quantize import hqq as solver
from qformats.quantize import rtn
from qformats.scheme import Cyclic, Float, Integer, Scheme, Storage, Tile
from qformats.tensor import QuantizedTensor

FIXTURES = Path(__file__).parents[3] / "fixtures"
CASES = [f"{d}/{p.name}" for d in ("hqq", "quanto") for p in sorted((FIXTURES / d).iterdir())]
STORED = [case for case in CASES if "qmodel" not in case]


def opened(case: str, tmp_path: Path) -> Checkpoint:
    """The fixture without its oracle."""
    copy = tmp_path / "copy"
    shutil.copytree(FIXTURES / case, copy, ignore=shutil.ignore_patterns("oracle.safetensors"))
    return open_checkpoint(copy, allow_pickle="qmodel" in case)


def assembled(form: Any, storage: Storage, tensor: QuantizedTensor) -> dict[str, bytes]:
    """The bytes of all parts that ``write`` makes of a whole tensor."""
    layout = form.layout(storage, tensor.shape)
    found: dict[str, list[Any]] = {leaf: [] for leaf in layout}
    for piece in form.write(storage, tensor, 0, tensor.shape):
        found[piece.leaf].append((piece.row, piece.array.tobytes()))
    return {leaf: b"".join(data for _, data in sorted(pieces)) for leaf, pieces in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_owners_in_any_row_range(case: str, tmp_path: Path) -> None:
    oracle = load_file(FIXTURES / case / "oracle.safetensors")
    with opened(case, tmp_path) as checkpoint:
        assert checkpoint.format == case.partition("/")[0]
        for name, wanted in oracle.items():
            module = checkpoint.modules[name.removesuffix(".weight")]
            form = registry.format_module(checkpoint.format)
            whole = form.read(module)
            assert whole.scheme == form.scheme(module)
            assert torch.equal(whole.dequantize(wanted.dtype, like=checkpoint.format), wanted), name
            n = wanted.shape[0]
            for start, stop in ((0, 1), (3, n - 1), (n // 2, n), (n - 1, n)):
                part = form.read(module, start, stop)
                assert torch.equal(part.dequantize(wanted.dtype, like=checkpoint.format), wanted[start:stop]), (name, start)
                assert torch.equal(part.dequantize(torch.float64), whole.dequantize(torch.float64)[start:stop])
                blank = form.read(module, start, stop, codes=False)
                assert blank.shape == part.shape and blank.scheme == part.scheme


@pytest.mark.parametrize("case", STORED)
def test_write_after_read_gives_the_same_bytes(case: str, tmp_path: Path) -> None:
    with opened(case, tmp_path) as checkpoint:
        form = registry.format_module(checkpoint.format)
        for name, module in checkpoint.modules.items():
            if not checkpoint.is_quantized(name):
                continue
            storage, tensor = form.storage_of(module), form.read(module)
            assert form.can_store(storage, tensor.scheme), form.can_store(storage, tensor.scheme)
            layout = form.layout(storage, tensor.shape)
            parts = {leaf: raw for leaf, raw in module.parts.items() if leaf in layout}
            assert {leaf: (info.dtype, info.shape) for leaf, info in layout.items()} == {
                leaf: (raw.dtype, raw.shape) for leaf, raw in parts.items()
            }
            made = assembled(form, storage, tensor)
            scales = {"input_scale", "output_scale"}  # ours are those of activations that are not quantized
            assert {leaf: data for leaf, data in made.items() if leaf not in scales} == {
                leaf: raw.read() for leaf, raw in parts.items() if leaf not in scales
            }


def test_a_pickled_model_needs_consent() -> None:
    directory = FIXTURES / "hqq/qmodel-4b-g32-ax1/qmodel.pt"
    with pytest.raises(Unsafe):
        open_checkpoint(directory)


def test_axis_0_is_cyclic_as_a_whole_and_spread_in_ranges(tmp_path: Path) -> None:
    with opened("hqq/4b-g16-ax0-f16-floatview", tmp_path) as checkpoint:
        form, module = registry.format_module("hqq"), checkpoint.modules["model.layers.0.mlp.down_proj"]
        assert form.read(module).scales[0].block == Cyclic(32 * 160 // 16)
        assert form.read(module, 1, 3).scales[0].block == Tile((1, 1))


@pytest.mark.parametrize("bits,shifts,word", [(4, (4, 0), 1), (4, (0, 4), 1), (2, (0, 2, 4, 6), 1), (1, tuple(range(7, -1, -1)), 1),
                                              (3, tuple(range(27, -1, -3)), 4), (8, (0,), 1)])  # fmt: skip
def test_slabs_are_unpacked_as_packed(bits: int, shifts: tuple[int, ...], word: int) -> None:
    rng = np.random.default_rng(bits)
    for rows in (8, 40, 64):
        slabs = Slabs(rows, 24, bits, shifts, word)
        codes = rng.integers(0, 1 << bits, rows * 24).astype(np.uint8)
        raw = RawTensor.from_array("x", "U8" if word == 1 else "I32", slabs.pack(codes))
        assert raw.shape == (slabs.packed_rows, 24) and raw.nbytes == slabs.nbytes
        for start, stop in ((0, rows * 24), (1, 7), (rows * 12 - 3, rows * 12 + 3), (24, rows * 24 - 5)):
            assert np.array_equal(slabs.unpack(raw, start, stop), codes[start:stop])


def test_first_slab_lies_high_in_hqq_and_low_in_quanto() -> None:
    codes = np.array([1, 2, 3, 4], np.uint8)
    assert Slabs(2, 2, 4, (4, 0)).pack(codes).tobytes().hex() == "1324"
    assert Slabs(2, 2, 4, (0, 4)).pack(codes).tobytes().hex() == "3142"


# ---------------------------------------------------------------- bad input


def scalar(raw: RawTensor, value: int) -> RawTensor:
    return RawTensor.from_array(raw.name, raw.dtype, np.full(raw.shape, value, raw.array().dtype))


def word(text: str) -> RawTensor:
    return RawTensor.from_array("word", "U8", np.frombuffer(text.encode(), np.uint8))


def nan_of(raw: RawTensor) -> RawTensor:
    array = raw.array()
    array.reshape(-1)[0] = 0x7FC0 if raw.dtype == "BF16" else np.nan
    return RawTensor.from_array(raw.name, raw.dtype, array)


HQQ_BREAKS: dict[str, tuple[str, Any]] = {
    "no codes": ("W_q", None), "no scale": ("scale", None), "no zero": ("zero", None), "no shape": ("shape", None),
    "no axis": ("axis", None),
    "codes of another dtype": ("W_q", lambda r: replace(r, dtype="I8")),
    "codes cut": ("W_q", lambda r: replace(r, shape=(r.shape[0] - 1, r.shape[1]), nbytes=r.nbytes - r.shape[1])),
    "scale flat": ("scale", lambda r: replace(r, shape=(r.shape[0],))),
    "scale of integers": ("scale", lambda r: replace(r, dtype="I16")),
    "NaN": ("scale", nan_of), "NaN in zero": ("zero", nan_of),
    "axis 2": ("axis", lambda r: scalar(r, 2)), "7 bits": ("nbits", lambda r: scalar(r, 7)),
    "no width": ("group_size", lambda r: scalar(r, 0)),
    "a huge group": ("group_size", lambda r: scalar(r, 1 << 30)),
    "code to run": ("compute_dtype", lambda r: word("__import__('os').getpid()")),
    "letters of control": ("packing", lambda r: word("4bit\n")), "unknown packing": ("packing", lambda r: word("4bit_xx")),
    "narrow packing": ("packing", lambda r: word("2bit_u8")), "negative shape": ("shape", lambda r: scalar(r, -5)),
    "flag of many": ("view_as_float", lambda r: word("yes")),
}  # fmt: skip


@pytest.mark.parametrize("case", HQQ_BREAKS)
def test_broken_hqq_layers_are_one_error(case: str, tmp_path: Path) -> None:
    leaf, change = HQQ_BREAKS[case]
    with opened("hqq/4b-g32-ax1-f16", tmp_path) as checkpoint:
        module = checkpoint.modules["model.layers.0.self_attn.q_proj"]
        parts = {name: raw for name, raw in module.parts.items() if name != leaf}
        parts |= {leaf: change(module.parts[leaf])} if change else {}
        form = registry.format_module("hqq")
        with pytest.raises((BadFile, Unsupported)):
            broken = Module(module.name, parts, module.match)
            form.scheme(broken)
            form.read(broken)


QUANTO_BREAKS: dict[str, tuple[str, Any]] = {
    "no scale": ("weight._scale", None), "no shift": ("weight._shift", None),
    "codes of another dtype": ("weight._data._data", lambda r: replace(r, dtype="I8")),
    "codes cut": ("weight._data._data", lambda r: replace(r, shape=(r.shape[0] - 1, r.shape[1]))),
    "codes flat": ("weight._data._data", lambda r: replace(r, shape=(r.shape[0] * r.shape[1],))),
    "scale of integers": ("weight._scale", lambda r: replace(r, dtype="I16")),
    "shift of another shape": ("weight._shift", lambda r: replace(r, shape=(r.shape[0] // 2, 2))),
    "NaN": ("weight._scale", nan_of), "NaN in shift": ("weight._shift", nan_of),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTO_BREAKS)
def test_broken_quanto_layers_are_one_error(case: str, tmp_path: Path) -> None:
    leaf, change = QUANTO_BREAKS[case]
    with opened("quanto/qint4-f16", tmp_path) as checkpoint:
        module = checkpoint.modules["model.layers.0.mlp.down_proj"]
        parts = {name: raw for name, raw in module.parts.items() if name != leaf}
        parts |= {leaf: change(module.parts[leaf])} if change else {}
        form = registry.format_module("quanto")
        broken = Module(module.name, parts, module.match, columns=module.columns)
        with pytest.raises(BadFile):
            form.scheme(broken)
            form.read(broken)


def test_quanto_says_where_the_columns_are_unknown(tmp_path: Path) -> None:
    with opened("quanto/qint4-f16", tmp_path) as checkpoint:
        form, module = registry.format_module("quanto"), checkpoint.modules["model.layers.0.mlp.down_proj"]
        assert module.columns == 160 and form.scheme(module).shape == (32, 160)
        with pytest.raises(Unsupported, match="said nowhere"):
            form.scheme(Module(module.name, module.parts, module.match))
        with pytest.raises(BadFile, match="disagree"):
            form.scheme(Module(module.name, module.parts, module.match, columns=150))
        lying = Match("quanto", {"quant_method": "quanto", "modules": {module.name: {"weights": "qint2"}}})
        with pytest.raises(BadFile, match="the map says"):
            form.scheme(Module(module.name, module.parts, lying, columns=160))


# ---------------------------------------------------------------- targets and new codes


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", ["1", "1.58", "2", "3", "4", "5", "6", "8"])
def test_new_hqq_codes_are_read_as_written_and_never_worse_than_min_max(bits: str, axis: int) -> None:
    form = registry.format_module("hqq")
    weights = torch.randn(40, 96, generator=torch.Generator().manual_seed(3)) * 0.05
    weights[2] = 0
    storage = form.storages(Target("hqq", f"int{bits}", {"group": "24", "axis": str(axis)}), Scheme((40, 96), Float("bf16")))[0]
    made, plain = rtn(weights, storage), solver.quantize(weights, storage, turns=0)
    assert form.can_store(storage, made.scheme), form.can_store(storage, made.scheme)
    error = [(t.dequantize(torch.float32) - weights).square() for t in (made, plain)]
    groups = [e.reshape(-1, 24).sum(1) if axis else e.reshape(24, -1).sum(0) for e in error]
    assert bool((groups[0] <= groups[1] * (1 + 1e-5) + 1e-12).all())
    again = form.read(Module("m", parts_of(form, storage, made), Match("hqq", {})))
    assert torch.equal(again.codes, made.codes) and torch.equal(again.dequantize(torch.float64), made.dequantize(torch.float64))
    config = form.config_out(Target("hqq"), {"model.layers.0.mlp.up_proj": storage}, ["lm_head"], None)
    assert config["quant_config"]["weight_quant_params"]["axis"] == axis and config["quant_method"] == "hqq"


def parts_of(form: Any, storage: Storage, tensor: QuantizedTensor) -> dict[str, RawTensor]:
    from qformats.containers.source import MemorySource

    data, layout = assembled(form, storage, tensor), form.layout(storage, tensor.shape)
    sources = {leaf: MemorySource(data[leaf], leaf) for leaf in layout}
    return {leaf: RawTensor(leaf, info.dtype, info.shape, sources[leaf], 0, len(data[leaf])) for leaf, info in layout.items()}


def test_importances_lower_the_error_where_they_are_large() -> None:
    form = registry.format_module("hqq")
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    importance = torch.ones(64)
    importance[::8] = 100.0
    storage = form.storages(Target("hqq", "int2", {"group": "64"}), Scheme((64, 64), Float("bf16")))[0]
    plain, weighed = rtn(weights, storage), rtn(weights, storage, importance)
    error = [float(((t.dequantize(torch.float32) - weights).square() * importance).sum()) for t in (plain, weighed)]
    assert error[1] <= error[0]


@pytest.mark.parametrize("kind", ["qint8", "qint4", "qint2", "qfloat8_e4m3fn", "qfloat8_e5m2", "qfloat8_e4m3fnuz"])
@pytest.mark.parametrize("shape", [(33, 192), (16, 64), (1, 96), (6, 256)])
def test_new_quanto_codes_are_read_as_written(kind: str, shape: tuple[int, int]) -> None:
    form = registry.format_module("quanto")
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(torch.float16)
    weights[0] = 0
    for target in ({"zeropoint": "no"}, {"zeropoint": "yes"}):
        try:
            storage = form.storages(Target("quanto", kind, target), Scheme(shape, Integer(8)))[0]
        except Unsupported:
            assert kind in ("qint4", "qint2") and shape == (1, 96)
            continue
        made = rtn(weights, storage)
        module = Module("m", parts_of(form, storage, made), Match("quanto", {"modules": {"m": {"weights": kind}}}), columns=shape[1])
        again = form.read(module)
        assert torch.equal(again.codes, made.codes) and torch.equal(again.dequantize(torch.float64), made.dequantize(torch.float64))
        assert form.storage_of(module) == storage
        assert not again.dequantize(torch.float32)[0].any()


def test_targets_refuse_what_they_do_not_know() -> None:
    scheme = Scheme((32, 64), Float("bf16"))
    wrong = [("hqq", "int4", {"axis": "2"}), ("hqq", "int4", {"dtype": "int8"}), ("hqq", "int7", {}), ("quanto", "qint3", {})]
    wrong += [("quanto", "qint4", {"dtype": "float8"}), ("quanto", "qint4", {"zeropoint": "x"})]
    for name, kind, choices in wrong:
        with pytest.raises(QFormatError):
            registry.format_module(name).storages(Target(name, kind, choices), scheme)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zero", ["float", "int", "offset"])
def test_values_on_runs_are_those_of_the_formula(dtype: torch.dtype, zero: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of columns, with and without the compiled loop, and the definition, against torch's own operations on all weights."""
    from qformats import steps
    from qformats.tensor import Param

    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 16, (24, 256), dtype=torch.uint8, generator=generator)
    scale, moved = (torch.rand(24, 4, generator=generator).to(dtype) for _ in range(2))
    tile, spread = Tile((1, 64)), [v.repeat_interleave(64, 1) for v in (scale, moved)]
    point = Param((moved * 15).to(torch.uint8) if zero == "int" else moved, tile)
    t = QuantizedTensor(
        (24, 256), codes, Integer(4), (Param(scale, tile),), None if zero == "offset" else point, point if zero == "offset" else None
    )
    point_wide = point.values.to(dtype).repeat_interleave(64, 1)  # type: ignore[union-attr]
    wanted = codes.to(dtype) * spread[0] + spread[1] if zero == "offset" else (codes.to(dtype) - point_wide) * spread[0]
    assert torch.equal(t.dequantize(dtype, like="hqq"), wanted)
    monkeypatch.setattr(steps, "_loops", lambda codes: None)
    assert torch.equal(t.dequantize(dtype, like="hqq"), wanted)
    monkeypatch.setattr(steps, "rounded", lambda *args, **options: None)
    assert torch.equal(t.dequantize(dtype, like="hqq"), wanted)

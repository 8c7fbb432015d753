"""What every format owes, whichever it is: a new registry row gets these tests by adding fixtures.

Storages and modules come from the registry and the fixtures only; no format is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import ALL, DENSE, ENTRIES, FIXTURES, converted, ready

from qformats import registry
from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, QFormatError, Unsupported, UsageError
from qformats.formats.protocol import Match, Module, PartInfo, Piece
from qformats.scheme import Integer, Scheme, Storage, Tile
from qformats.tensor import Param, QuantizedTensor, constant

ROWS = [row for row in registry.ROWS if row.name != "hf" and row.types]  # one without types takes no codes but its own
GGUF_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
PARAM_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


def checkpoints(work: Path) -> Iterator[tuple[str, Checkpoint]]:
    for path in ALL:
        yield path, open_checkpoint(FIXTURES / path)
    for kind in GGUF_TYPES:
        out = work / f"{kind}.gguf"
        if not out.exists():
            converted(ready("dense/qwen2", work), out, f"gguf:{kind}")
        yield f"gguf {kind}", open_checkpoint(out)


def quantized(checkpoint: Checkpoint) -> list[Module]:
    return [m for name, m in checkpoint.modules.items() if checkpoint.is_quantized(name)]


def assembled(form: Any, storage: Storage, tensor: QuantizedTensor, step: int, module: Module | None = None) -> dict[str, RawTensor]:
    """The parts that ``write`` makes of ``tensor`` handed over in row ranges, as they are read from ``module`` if it is one's."""
    shape = tensor.shape if module is None else form.scheme(module).shape  # stacked experts are read as rows of all
    layout: dict[str, PartInfo] = form.layout(storage, shape)
    pieces: list[Piece] = []
    step = tensor.shape[0] if storage.together else lcm(step, storage.row_unit(tensor.shape) or tensor.shape[0])
    for start in range(0, tensor.shape[0], step):
        stop = min(tensor.shape[0], start + step)
        rows = rows_of(tensor, start, stop) if module is None else form.read(module, start, stop)
        pieces += form.write(storage, rows, start, shape)
    parts = {}
    for leaf, info in layout.items():
        mine = [p for p in pieces if p.leaf == leaf]
        height = max(p.row + p.array.shape[0] for p in mine) if mine else 0
        width = max(p.column + p.array.shape[1] for p in mine) if mine else 0
        plane = np.zeros((height, width), mine[0].array.dtype if mine else np.uint8)
        for piece in mine:
            plane[piece.row : piece.row + piece.array.shape[0], piece.column : piece.column + piece.array.shape[1]] = piece.array
        parts[leaf] = raw_of(info, plane.tobytes())
    return parts


def raw_of(info: PartInfo, data: bytes) -> RawTensor:
    from qformats.containers.source import MemorySource

    return RawTensor("x", info.dtype, info.shape, MemorySource(data, "memory"), 0, len(data))


def rows_of(t: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    from qformats import rewrite

    return rewrite.select_rows(t, torch.arange(start, stop))


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Equal codes and parameters, spread over the weight (a constant equals a plane of it)."""
    if a.shape != b.shape or a.grid != b.grid or not torch.equal(a.codes, b.codes):
        return False
    if [n for n, _ in a.params()] != [n for n, _ in b.params()]:
        return False
    return torch.equal(a.dequantize(torch.float64), b.dequantize(torch.float64))


def test_every_row_has_the_names_of_the_protocol() -> None:
    names = ("NAME", "SUFFIXES", "detect", "scheme", "read", "storages", "layout", "write", "config_out", "can_store")
    for row in registry.ROWS:
        module = registry.format_module(row.name)
        assert [n for n in names if not hasattr(module, n)] == []
        assert row.name in (module.NAME, "hf")


@pytest.mark.parametrize("path", ALL + DENSE)
def test_exactly_one_format_knows_a_fixture(path: str) -> None:
    with open_checkpoint(FIXTURES / path) as checkpoint:
        config = checkpoint.match.config
        names = list(checkpoint.raw)
        claims = [row.name for row in registry.ROWS if registry.format_module(row.name).detect(config, names) is not None]
        expected = ENTRIES[path]["format"].replace("dense", "hf")
        assert checkpoint.format == expected and claims == [expected]


def test_write_after_read_is_the_same_module(work: Path) -> None:
    for name, checkpoint in checkpoints(work):
        with checkpoint:
            for module in quantized(checkpoint)[:3]:
                form = registry.format_module(module.match.format)
                if not hasattr(form, "storage_of"):
                    continue
                storage, tensor = form.storage_of(module), form.read(module)
                if storage.options.get("read_only"):
                    continue
                parts = assembled(form, storage, tensor, 32, module)
                kept = parts.keys() - getattr(form, "WRITTEN", frozenset())  # those are the activations' own
                assert {leaf: parts[leaf].read() for leaf in kept} == {leaf: module.parts[leaf].read() for leaf in kept}, name


def test_read_after_write_is_the_same_tensor_in_every_storage(work: Path) -> None:
    """Whatever a format offers for its own tensors and takes: written and read again it is the same value."""
    checked = 0
    for path in ALL:
        with open_checkpoint(FIXTURES / path) as checkpoint:
            module = quantized(checkpoint)[0]
            form = registry.format_module(module.match.format)
            storage, tensor = form.storage_of(module), form.read(module)
            if storage.options.get("read_only"):
                continue
            assert form.can_store(storage, tensor.scheme)
            again = form.read(replace(module, parts={**module.parts, **assembled(form, storage, tensor, 32, module)}, memo={}))
            assert same(again, tensor), path
            checked += 1
    assert checked >= len(ALL) - 4  # sparse ones are only read


def one_level(storage: Storage) -> bool:
    """Whether ``form_of`` can build it: integers under one scale. The other block types have tests of their own."""
    tiles = storage.rows != 1
    special = tiles or storage.sub_scale is not None or storage.scale_grid is not None or storage.highest is not None or storage.doubled
    return isinstance(storage.grid, Integer) and not special


def form_of(storage: Storage, bits_from: int, n: int, k: int, seed: int) -> QuantizedTensor:
    """A random tensor exactly in the form a one-level storage declares."""
    generator = torch.Generator().manual_seed(seed)
    group = min(storage.group or k, k)
    low, high = storage.grid.lowest, storage.grid.highest
    dtype = torch.int8 if storage.grid.signed else torch.uint8
    codes = torch.randint(low, high + 1, (n, k), generator=generator).to(dtype)
    scale = (torch.rand((n, -(-k // group)), generator=generator) + 0.5).to(PARAM_DTYPES[storage.scale_dtypes[0]])
    tile, zero, offset = Tile((1, group)), None, None
    if isinstance(storage.zero_point, int):
        zero = constant(storage.zero_point, (n, k))
    elif storage.zero_dtype is not None:
        zero = Param((torch.rand(scale.shape, generator=generator) * high).to(PARAM_DTYPES[storage.zero_dtype]), tile)
    elif storage.zero_point is not None:
        zlow, zhigh = storage.zero_point
        zero = Param(torch.randint(zlow, zhigh + 1, scale.shape, generator=generator).to(torch.int16), tile)
    if storage.offset is not None:
        offset = Param((torch.rand(scale.shape, generator=generator) - 0.5).to(PARAM_DTYPES[storage.offset]), tile)
    scales = (Param(scale, tile),)
    if storage.factor is not None:
        factor = 0.5 if storage.factor.constant is None else storage.factor.constant
        scales += (constant(factor, (n, k), PARAM_DTYPES[storage.factor.dtype]),)
    return QuantizedTensor((n, k), codes, Integer(storage.grid.bits, storage.grid.signed), scales, zero, offset)


def own_storages(row: registry.Row) -> list[Storage]:
    from qformats.formats.protocol import Target

    scheme = Scheme((64, 128), Integer(4))
    form, found = registry.format_module(row.name), []
    for kind in row.types:
        if kind not in ("f16", "bf16", "f32"):
            options = {"group": "32"} if "group" in row.options else {}
            try:
                found += form.storages(Target(row.name, kind, options), scheme)
            except UsageError:  # a type without groups
                found += form.storages(Target(row.name, kind, {}), scheme)
    return found


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_can_store_agrees_with_write(row: registry.Row) -> None:
    """A tensor in the declared form is accepted, written in the promised layout and of the promised size; another's form is refused."""
    form = registry.format_module(row.name)
    storages = own_storages(row)
    assert len(storages) > 0
    for number, storage in enumerate(storages):
        if not one_level(storage):
            continue
        tensor = form_of(storage, 4, 64, 128, number)
        assert form.can_store(storage, tensor.scheme), (storage.type, form.can_store(storage, tensor.scheme))
        parts = assembled(form, storage, tensor, 32)
        layout = form.layout(storage, tensor.shape)
        assert {leaf: (raw.dtype, raw.shape) for leaf, raw in parts.items()} == {leaf: (i.dtype, i.shape) for leaf, i in layout.items()}
        for other in storages:
            if other.grid == storage.grid:
                continue
            assert not form.can_store(other, tensor.scheme), (other.type, storage.type)
            with pytest.raises(QFormatError):
                form.write(other, tensor, 0, tensor.shape)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_written_tensor_is_read_again_under_its_own_config(row: registry.Row, work: Path) -> None:
    form = registry.format_module(row.name)
    for number, storage in enumerate(own_storages(row)):
        if not one_level(storage):
            continue
        tensor = form_of(storage, 4, 64, 128, number)
        parts = assembled(form, storage, tensor, 32)
        if row.container == "gguf":
            match = Match("gguf", {"container": "gguf"})
        else:
            from qformats.formats.protocol import Target

            target = Target(row.name, storage.type, {})
            config = form.config_out(target, {"m": storage}, [], None)
            json.dumps(config)
            found = form.detect(config, [f"m.{leaf}" for leaf in parts])
            assert found is not None
            describe = getattr(form, "metadata_out", None)
            match = found if describe is None else replace(found, metadata=describe({"m": (storage, tensor.shape)}, {}))
        assert same(form.read(Module("m", parts, match, columns=tensor.shape[1])), tensor), storage


@pytest.mark.parametrize("path", ["gptq/4b-g32-sym", "gptq/3b-g32-asym-v1", "awq/gemm-g32", "awq/gemv-g64", "autoround/awq-4b-g32-asym"])
@pytest.mark.parametrize("change", ["missing", "dtype", "ragged", "flat"])
def test_broken_modules_are_refused_from_headers(path: str, change: str) -> None:
    """Each stored plane in turn is taken away, given another dtype, cut, or flattened."""
    with open_checkpoint(FIXTURES / path) as checkpoint:
        module = quantized(checkpoint)[0]
        form = registry.format_module(module.match.format)
        for leaf in ("qweight", "qzeros", "scales"):
            raw, parts = module.parts[leaf], dict(module.parts)
            del parts[leaf]
            if change == "dtype":
                parts[leaf] = replace(raw, dtype="F32" if raw.dtype == "I32" else "I16")
            elif change == "ragged":
                parts[leaf] = replace(raw, shape=(raw.shape[0], raw.shape[1] - 1))
            elif change == "flat":
                parts[leaf] = replace(raw, shape=(raw.shape[0] * raw.shape[1],))
            with pytest.raises((BadFile, Unsupported)) as caught:
                form.scheme(replace(module, parts=parts))
            sizes = ("wrong-shape", "config-disagrees", "group-size", "bits-disagree")
            expected = {"missing": (f"missing-{leaf}",), "dtype": ("wrong-dtype",)}.get(change, sizes)
            assert caught.value.code in expected, caught.value

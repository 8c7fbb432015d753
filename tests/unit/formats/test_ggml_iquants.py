"""ggml's codebook types against gguf-py's dequantizer and on every bit a block has."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.errors import Unsupported
from qformats.formats import ggml
from qformats.formats.ggml.iquants import IQUANTS, IQuant
from qformats.formats.protocol import Match, Module
from qformats.scheme import No, Yes
from qformats.tensor import QuantizedTensor

TYPES = list(IQUANTS)
SPECIAL = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0xBC00], np.uint16)
Blocks = np.ndarray[Any, Any]


def with_d(name: str, blocks: Blocks, d: Blocks) -> Blocks:
    """``blocks`` (n, bytes) with the fp16 bit patterns ``d`` (n,) in place; IQ1_M keeps them in the top nibbles of its last four words."""
    if name != "IQ1_M":
        blocks[:, :2] = d[:, None].view(np.uint8)
        return blocks
    for i in range(4):
        blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 15) | ((d >> 4 * i & 15) << 4).astype(np.uint8)
    return blocks


@cache
def finite_blocks(name: str, count: int = 120) -> Blocks:
    """All bits random but d's, which is finite: all special ones occur."""
    rng = np.random.default_rng(sum(name.encode()))
    blocks = rng.integers(0, 256, (count, IQUANTS[name].nbytes), dtype=np.uint8)
    d = rng.integers(0, 1 << 16, count).astype(np.uint16)
    d[(d & 0x7C00) == 0x7C00] ^= 0x4000
    d[: len(SPECIAL)] = SPECIAL[:count]
    blocks[len(SPECIAL) :: 3, 2:] &= rng.integers(0, 256, blocks[len(SPECIAL) :: 3, 2:].shape, dtype=np.uint8)
    blocks[20, 2:], blocks[21, 2:] = 0, 255
    return with_d(name, blocks, d)


def theirs(name: str, blocks: Blocks) -> Blocks:
    values: Blocks = quants.dequantize(blocks.reshape(4, -1), GGMLQuantizationType[name])
    return values


def bits(values: Any) -> Blocks:
    return np.asarray(values, np.float32).view(np.uint32)


def read(name: str, blocks: Blocks, **options: Any) -> QuantizedTensor:
    return ggml.read(module(name, blocks), **options)


def module(name: str, blocks: Blocks, *, big_endian: bool = False) -> Module:
    shape = (len(blocks), blocks.shape[1] // IQUANTS[name].nbytes * 256)
    raw = RawTensor("w", name, shape, MemorySource(blocks.tobytes()), 0, blocks.nbytes, big_endian)
    return Module("w", {"weight": raw}, Match("gguf", {"container": "gguf"}))


def write(name: str, tensor: QuantizedTensor) -> Blocks:
    (piece,) = ggml.write(IQUANTS[name].storage, tensor, 0, tensor.shape)
    return piece.array


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_ggml_s(name: str) -> None:
    from gguf.constants import GGML_QUANT_SIZES

    kind = IQUANTS[name]
    assert (kind.block, kind.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", TYPES)
def test_definition_equals_gguf_py_bit_for_bit(name: str) -> None:
    blocks = finite_blocks(name)
    found = IQUANTS[name].dequantize_blocks(torch.from_numpy(blocks.reshape(4, -1)))
    assert np.array_equal(bits(found), bits(theirs(name, blocks)))


@pytest.mark.parametrize("name", TYPES)
def test_every_code_in_every_place_equals_gguf_py(name: str) -> None:
    """Each entry of the book in each place of a block."""
    kind = IQUANTS[name]
    entries, places = 1 << kind.code_bits, kind.plane_specs[0].width
    blocks = finite_blocks(name, max(entries, 32))[:entries]
    codes, *params = kind.unpack_blocks(torch.from_numpy(blocks))
    order = torch.arange(entries * places)
    codes = ((order + order // max(entries, places)) % entries).reshape(codes.shape).to(codes.dtype)
    assert all(len(torch.unique(place)) == entries for place in codes.T)
    packed = kind.pack_blocks(codes, *params)
    assert torch.equal(kind.unpack_blocks(packed)[0], codes)
    assert np.array_equal(bits(kind.dequantize_blocks(packed)).reshape(4, -1), bits(theirs(name, packed.numpy())))


@pytest.mark.parametrize("name", TYPES)
def test_tensor_means_the_same(name: str) -> None:
    blocks = finite_blocks(name)
    tensor, expected = read(name, blocks.reshape(4, -1)), theirs(name, blocks)
    assert np.array_equal(bits(tensor.dequantize(like="ggml")), bits(expected))
    assert np.array_equal(tensor.dequantize(torch.float32).numpy(), expected)  # exact: only a zero's sign may differ


@pytest.mark.parametrize("name", TYPES)
def test_any_bytes_survive(name: str) -> None:
    """Random bytes, d among them NaN and infinite, and every single bit alone: no bit is unused and none is changed."""
    nbytes = IQUANTS[name].nbytes
    random = np.random.default_rng(5).integers(0, 256, (64, nbytes), dtype=np.uint8)
    single = np.packbits(np.eye(8 * nbytes, dtype=np.uint8), axis=1)
    for blocks in (random, random.reshape(8, -1), single, ~single, np.zeros((1, nbytes), np.uint8), np.full((1, nbytes), 255, np.uint8)):
        tensor = read(name, blocks)
        assert np.array_equal(write(name, tensor), blocks)
    planes = IQUANTS[name].unpack_blocks(torch.from_numpy(single))
    seen = torch.cat([p.view(torch.int16 if p.element_size() == 2 else torch.uint8).to(torch.int32) for p in planes if p is not None], 1)
    assert len(torch.unique(seen, dim=0)) == 8 * nbytes and bool((seen != 0).any(1).all())


@pytest.mark.parametrize("name", TYPES)
def test_scheme_from_the_header_is_the_tensor_s_own(name: str) -> None:
    source = module(name, finite_blocks(name).reshape(4, -1))
    tensor = ggml.read(source)
    assert ggml.scheme(source) == tensor.scheme
    assert isinstance(ggml.can_store(IQUANTS[name].storage, tensor.scheme), Yes)
    others = [kind.storage for other, kind in ggml.BLOCK_TYPES.items() if other != name]
    assert all(isinstance(ggml.can_store(storage, tensor.scheme), No) for storage in others)


@pytest.mark.parametrize("name", TYPES)
def test_row_ranges_and_parameters_alone(name: str) -> None:
    blocks = finite_blocks(name).reshape(4, -1)
    whole, part = read(name, blocks), read(name, blocks, start=1, stop=3)
    assert torch.equal(part.codes, whole.codes[1:3]) and np.array_equal(write(name, part), blocks[1:3])
    alone = read(name, blocks, codes=False)
    assert alone.scheme == whole.scheme and alone.codes.stride() == (0, 0)
    zeros = whole.replace(codes=torch.zeros_like(whole.codes))
    assert torch.equal(alone.dequantize(torch.float64), zeros.dequantize(torch.float64))


@pytest.mark.parametrize(("name", "words"), [
    ("IQ2_XXS", [(0, 2), *((at, 4) for at in range(2, 66, 4))]), ("IQ2_XS", [(at, 2) for at in range(0, 66, 2)]), ("IQ2_S", [(0, 2)]),
    ("IQ3_XXS", [(0, 2), *((at, 4) for at in range(66, 98, 4))]), ("IQ3_S", [(0, 2)]), ("IQ4_XS", [(0, 2), (2, 2)]),
    ("IQ1_S", [(0, 2), *((at, 2) for at in range(34, 50, 2))]), ("IQ1_M", [(at, 2) for at in range(48, 56, 2)]),
])  # fmt: skip
def test_big_endian_words_are_swapped(name: str, words: list[tuple[int, int]]) -> None:
    blocks = finite_blocks(name)
    swapped = blocks.copy()
    for at, width in words:
        swapped[:, at : at + width] = blocks[:, at : at + width][:, ::-1]
    other = ggml.read(module(name, swapped, big_endian=True))
    assert np.array_equal(write(name, other), blocks)


def changed(name: str, what: str) -> QuantizedTensor:
    tensor = read(name, finite_blocks(name).reshape(4, -1))
    if what == "code":
        codes = tensor.codes.clone()
        codes[1, 2] = 1 << IQUANTS[name].code_bits
        return tensor.replace(codes=codes)
    if what == "negative code":
        codes = tensor.codes.clone()
        codes[1, 2] = -1
        return tensor.replace(codes=codes)
    if what == "signs":
        assert tensor.signs is not None
        signs = tensor.signs.clone()
        signs[1, 2] ^= 4
        return tensor.replace(signs=signs)
    scale: Any = tensor.scales[0].values
    s = scale.codes.clone()
    s[1, 2] = 1 << IQUANTS[name].sub_bits
    return tensor.replace(scales=(tensor.scales[0].with_values(scale.replace(codes=s)), *tensor.scales[1:]))


@pytest.mark.parametrize(("name", "what", "words"), [
    *((name, "signs", "odd number of minus signs") for name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS")),
    *((name, "code", "a code is") for name in ("IQ2_XS", "IQ2_S", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_XS")),
    *((name, "negative code", "a code is -1") for name in ("IQ2_XS", "IQ1_M")),
    *((name, "sub-scale", "a sub-scale is") for name in TYPES),
])  # fmt: skip
def test_what_a_block_has_no_bits_for_is_refused(name: str, what: str, words: str) -> None:
    with pytest.raises(Unsupported, match=words) as refusal:
        write(name, changed(name, what))
    assert refusal.value.code == "form"


def test_signs_of_their_own_bits_may_be_odd() -> None:
    for name in ("IQ2_S", "IQ3_S"):
        tensor = changed(name, "signs")
        assert torch.equal(read(name, write(name, tensor)).dequantize(torch.float64), tensor.dequantize(torch.float64))


def test_a_missing_sign_plane_is_named() -> None:
    tensor = read("IQ2_S", finite_blocks("IQ2_S").reshape(4, -1))
    answer = ggml.can_store(IQUANTS["IQ2_S"].storage, tensor.replace(signs=None).scheme)
    assert isinstance(answer, No) and "sign plane" in answer.reason


def test_iq2_xxs_worked_example() -> None:
    """d = 4, the first pair of words: codes 1 2 3 4, signs 1 0 0 64, s = 2: scale 4 * 2.5 / 4."""
    aux = 1 | 64 << 21 | 2 << 28
    block = bytes.fromhex("0044" + "01020304") + aux.to_bytes(4, "little") + bytes(56)
    (w,) = IQUANTS["IQ2_XXS"].dequantize_blocks(torch.frombuffer(bytearray(block), dtype=torch.uint8)[None])
    book = torch.tensor([[43, 8, 8, 8, 8, 8, 8, 8], [25, 25, 8, 8, 8, 8, 8, 8], [8, 43, 8, 8, 8, 8, 8, 8], [43, 43, 8, 8, 8, 8, 8, 8]])
    book[0, 0], book[0, 7], book[3, 6], book[3, 7] = -43, -8, -8, -8
    assert torch.equal(w[:32], 2.5 * book.flatten().float())


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 120])
def test_compiled_loop_equals_the_definition(name: str, count: int) -> None:
    loops = pytest.importorskip("qformats.loops.codebooks")
    blocks = finite_blocks(name, count).copy() if count > 21 else finite_blocks(name)[:count].copy()
    out = np.full((count, 256), np.nan, np.float32)
    loops.DEQUANTIZE[name](blocks, out)
    assert np.array_equal(bits(out), bits(IQUANTS[name].dequantize_blocks(torch.from_numpy(blocks))))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("loops", [True, False], ids=["loops", "torch"])
def test_dequantize(name: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loops:
        monkeypatch.setattr(ggml, "_loops", lambda: None)
    blocks = finite_blocks(name)
    out = np.full((4, 30 * 256), np.nan, np.float32)
    ggml.dequantize(name, blocks.reshape(4, -1), out)
    assert np.array_equal(bits(out), bits(theirs(name, blocks)))


def test_kinds_are_values() -> None:
    assert len({*IQUANTS.values()}) == len(TYPES) and all(isinstance(ggml.BLOCK_TYPES[name], IQuant) for name in TYPES)

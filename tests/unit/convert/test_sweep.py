"""Parts of weights taken away, of other types, shapes and numbers, in every format: each is refused with a code of ours.

What is accepted stands in ``ACCEPTED``, with the reason; anything else that converts is a failure, and so is any other exception. One
fixture of each format here; tests/real/test_sweep_all.py takes them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
from checkpoints import ALL, ENTRIES, header, load, planned, ready, store

from converters.execute import execute
from qformats.checkpoint import open_checkpoint
from qformats.errors import QFormatError

QUICK = list({ENTRIES[path]["format"]: path for path in ALL if path not in ("mxfp4", "torchao/kinds")}.values())
OTHER = {"F16": "I16", "BF16": "I16", "F32": "I32", "I32": "F32", "U8": "I8", "I8": "U8", "I64": "F64", "F8_E4M3": "I8", "F8_E8M0": "I8"}
NAN = {"F16": b"\0\x7e", "BF16": b"\xc0\x7f", "F32": b"\0\0\xc0\x7f", "F8_E4M3": b"\x7f", "F8_E8M0": b"\xff"}
INFINITE = {"F16": b"\0\x7c", "BF16": b"\x80\x7f", "F32": b"\0\0\x80\x7f"}
Part = tuple[str, list[int], bytes]

EXTRAS = r"(input|output|k|v)_scale|(in|out)put_activation_scale|activation_scale|input_scale_ub|_weight_act_.*"
# what converts all the same: format, leaf, changes; codes of any bits are codes, so ``ones`` is never asked for
ACCEPTED = [
    (".*", EXTRAS, "missing|flat|transposed|fold|unfold|halved|doubled|short|longer"),  # weights do not need them, whatever they scale
    ("compressed-tensors", "weight_shape", "missing"),  # groups tell how many columns there are
    ("compressed-tensors", "weight_shape|weight.shape|shape", "flat|transposed|unfold"),  # two numbers all the same
    ("compressed-tensors", "weight_scale|weight_global_scale", "flat"),  # (N,) for (N, 1), () for (1,)
    ("compressed-tensors", "weight.compressed|compressed", "nan first|nan last|infinite"),  # weights, not scales
    ("fbgemm_fp8|modelopt|fp8", "weight_scale|weight_scale_2|weight_scale_inv", "flat"),
    ("modelopt", "weight_scale", "transposed"),  # blocks of one number: (2, 1, 1, 1)
    ("modelopt", "pre_quant_scale", "missing|flat"),  # where it is part of the norm before
    ("modelopt|fp8", "weight", "dtype"),  # FP4 in bytes of either sign
    ("torchao", "_weight_per_tensor_scale", "missing|flat"),  # NVFP4 may have none
    ("torchao", "_weight_zero_point", "missing"),  # symmetric weights have none
    ("bitsandbytes", "weight", "dtype|nan first|nan last|infinite"),  # bytes of either sign, or seen as floats
    ("bitsandbytes", "weight_format", "missing"),  # rows
    ("hqq", "W_q", "nan first|nan last|infinite"),  # bytes seen as floats
    ("hqq", "(?!W_q|scale|zero|shape).*", ".*"),  # facts that are known without them, or that nothing depends on
    ("gemma", "embedding_scale", "halved|doubled"),  # any even number of blocks a row
    ("gptq", "g_idx", "missing|empty"),  # columns in order
    ("awq", "qzeros", "missing"),
    (".*", "bias", "missing|nan first|nan last|infinite"),  # floats, copied
]  # fmt: skip


def changes(dtype: str, shape: list[int], data: bytes, leaf: str) -> Iterator[tuple[str, Part | None]]:
    """What may be wrong with one part; None: it is missing."""
    yield "missing", None
    yield "dtype", (OTHER.get(dtype, "U8"), shape, data) if len(data) == prod(shape) or dtype in OTHER else None
    yield "empty", (dtype, [0, *shape[1:]], b"")
    yield "flat", (dtype, [prod(shape)] if len(shape) > 1 else [*shape, 1], data)
    if len(shape) > 1:
        yield "transposed", (dtype, [shape[1], shape[0], *shape[2:]], data)
        yield from _other_columns(dtype, shape, data)
    if shape and shape[0] > 1:
        row = len(data) // shape[0]
        yield "short", (dtype, [shape[0] - 1, *shape[1:]], data[: row * (shape[0] - 1)])
        yield "longer", (dtype, [shape[0] + 1, *shape[1:]], data + data[:row])
    if dtype in NAN and (not dtype.startswith("F8") or "scale" in leaf):
        yield "nan first", (dtype, shape, NAN[dtype] + data[len(NAN[dtype]) :])
        yield "nan last", (dtype, shape, data[: -len(NAN[dtype])] + NAN[dtype])
    if dtype in INFINITE:
        yield "infinite", (dtype, shape, INFINITE[dtype] + data[len(INFINITE[dtype]) :])
    yield "ones", (dtype, shape, b"\xff" * len(data))


def _other_columns(dtype: str, shape: list[int], data: bytes) -> Iterator[tuple[str, Part | None]]:
    """As many elements in other rows, and half and twice as many that would divide as evenly."""
    if shape[-1] % 2 == 0:
        yield "fold", (dtype, [shape[0] * 2, *shape[1:-1], shape[-1] // 2], data)
        yield "halved", (dtype, [*shape[:-1], shape[-1] // 2], data[: len(data) // 2])
    if shape[0] % 2 == 0:
        yield "unfold", (dtype, [shape[0] // 2, *shape[1:-1], shape[-1] * 2], data)
    yield "doubled", (dtype, [*shape[:-1], shape[-1] * 2], data * 2)


def accepted(form: str, leaf: str, what: str) -> bool:
    return what == "ones" or any(all(map(re.fullmatch, rule, (form, leaf, what))) for rule in ACCEPTED)


def _modules(source: Path, every: bool) -> list[list[tuple[str, str]]]:
    """Names and leaves of the parts of one quantized module, or of one of each kind."""
    with open_checkpoint(source) as opened:
        kinds: dict[object, list[tuple[str, str]]] = {}
        for name, module in opened.modules.items():
            if opened.is_quantized(name):
                kind = tuple(sorted((leaf, raw.dtype, len(raw.shape)) for leaf, raw in module.parts.items())) if every else None
                kinds.setdefault(kind, [(raw.name, leaf) for leaf, raw in module.parts.items()])
    return list(kinds.values())


def outcome(source: Path, out: Path) -> str:
    """The code with which a conversion to floats is refused, or ``""``; any exception but ours is a failure."""
    try:
        plan = planned(source, "hf:f32", allow_requantize=True)
        with plan.checkpoint:
            execute(plan, out, overwrite=True, workers=1)
    except QFormatError as error:
        return error.code
    return ""


def sweep(path: str, folder: Path, every: bool = False) -> None:
    source, form = ready(path, folder), ENTRIES[path]["format"]
    file = source / "model.safetensors"
    tensors, metadata = load(file), header(file).get("__metadata__")
    wrong = []
    for parts in _modules(source, every):
        for name, leaf in parts:
            for what, part in changes(*tensors[name], leaf):
                if part is not None and part[:2] == tensors[name][:2] and part[2] == tensors[name][2]:
                    continue
                changed = {key: value for key, value in tensors.items() if key != name}
                store(file, changed if part is None else {**changed, name: part}, metadata)
                try:
                    code = outcome(source, folder / "out")
                except Exception as error:  # the point of the test: nothing but our own errors comes out
                    pytest.fail(f"{name}, {what}: {error!r}")
                if not code and not accepted(form, leaf, what):
                    wrong.append(f"{name} {tensors[name][:2]}: {what}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", QUICK)
def test_one_of_each_format(path: str, tmp_path: Path) -> None:
    sweep(path, tmp_path)

"""Parts of weights taken away, of other types, shapes and numbers, in every format: a QFormatError with a code, or floats; nothing else.

One fixture of each format here; tests/real/test_sweep_all.py takes them all.
"""

from __future__ import annotations

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
NAN = {"F16": b"\0\x7e", "BF16": b"\xc0\x7f", "F32": b"\0\0\xc0\x7f"}
Part = tuple[str, list[int], bytes]


def changes(dtype: str, shape: list[int], data: bytes) -> Iterator[tuple[str, Part | None]]:
    """What may be wrong with one part; None: it is missing."""
    yield "missing", None
    yield "dtype", (OTHER.get(dtype, "U8"), shape, data) if len(data) == prod(shape) or dtype in OTHER else None
    yield "empty", (dtype, [0, *shape[1:]], b"")
    yield "flat", (dtype, [prod(shape)] if len(shape) > 1 else [*shape, 1], data)
    if len(shape) > 1:
        yield "transposed", (dtype, [shape[1], shape[0], *shape[2:]], data)
    if shape and shape[0] > 1:
        yield "short", (dtype, [shape[0] - 1, *shape[1:]], data[: len(data) // shape[0] * (shape[0] - 1)])
    if dtype in NAN:
        yield "nan", (dtype, shape, NAN[dtype] + data[len(NAN[dtype]) :])
    yield "ones", (dtype, shape, b"\xff" * len(data))


def sweep(path: str, folder: Path) -> None:
    source = ready(path, folder)
    with open_checkpoint(source) as opened:
        first = next(name for name in opened.modules if opened.is_quantized(name))
        names = [raw.name for raw in opened.modules[first].parts.values()]
    file = source / "model.safetensors"
    tensors, metadata = load(file), header(file).get("__metadata__")
    for name in names:
        for what, part in changes(*tensors[name]):
            changed = {key: value for key, value in tensors.items() if key != name}
            store(file, changed if part is None else {**changed, name: part}, metadata)
            try:
                plan = planned(source, "hf:f32", allow_requantize=True)
                with plan.checkpoint:
                    execute(plan, folder / "out", overwrite=True, workers=1)
            except QFormatError as error:
                assert error.code, (name, what)
            except Exception as error:  # the point of the test: nothing but our own errors comes out
                pytest.fail(f"{name}, {what}: {error!r}")


@pytest.mark.parametrize("path", QUICK)
def test_one_of_each_format(path: str, tmp_path: Path) -> None:
    sweep(path, tmp_path)

"""Tensors whose names have no dot are converted like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from converters import convert
from qformats.containers.gguf import TensorInfo, Value, layout_gguf, open_gguf


def test_names_without_dots_keep_their_values(tmp_path: Path) -> None:
    tensors = {"a": np.arange(48, dtype="<f4"), "b": np.arange(12, dtype="<f2").reshape(3, 4), "c.weight": np.ones(4, "<f4")}
    words = {"<f4": "F32", "<f2": "F16"}
    infos = [TensorInfo(name, words[values.dtype.str], values.shape) for name, values in tensors.items()]
    layout = layout_gguf({"general.architecture": Value("str", "x")}, infos)
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for name, values in tensors.items():
        data[layout.offsets[name] : layout.offsets[name] + values.nbytes] = values.tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    report = convert(tmp_path / "m.gguf", tmp_path / "c.gguf", to="gguf")
    assert report.lossless and [line.name for line in report.tensors] == list(tensors)
    found = open_gguf(tmp_path / "c.gguf").tensors
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name].array(), values)

"""Importance matrices against real llama.cpp: what is measured, how files are laid out, what is rounded under them; and shards that load.

llama.cpp's own tool is not among its shared libraries; its callback (``tools/imatrix/imatrix.cpp``) is written again over the evaluation
callback that it uses.
"""

from __future__ import annotations

import ctypes as C
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Workshop
from text import evaluation_text

from converters import convert
from converters.gguf_edit import merge_gguf, split_gguf
from qformats.containers.gguf import open_gguf
from qformats.quantize.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix

pytestmark = pytest.mark.real
CONTEXT, CHUNKS = 96, 3
Array = np.ndarray[Any, Any]


class Collector:
    """Σx² and token counts of every product with a weight of a block, as llama.cpp's tool takes them."""

    def __init__(self, llama: Any) -> None:
        self.base = llama.base_library()
        self.sums: dict[str, Array] = {}
        self.counts: dict[str, int] = {}
        self.callback = llama.EVAL_CALLBACK(self._on_tensor)

    def _on_tensor(self, pointer: Any, ask: bool, _: Any) -> bool:
        tensor = pointer.contents
        if self.base.ggml_op_desc(C.addressof(tensor)) != b"MUL_MAT":
            return not ask
        name, x = tensor.source(0).name.decode(), tensor.source(1)
        wanted = name.startswith("blk.") and x.ne[1] >= 16 and x.type == 0
        if ask or not wanted:
            return wanted or not ask
        rows = x.floats().reshape(-1, x.ne[0]).astype(np.float64)
        self.sums[name] = self.sums.get(name, 0) + (rows**2).sum(0)
        self.counts[name] = self.counts.get(name, 0) + len(rows)
        return True


@pytest.fixture(scope="module")
def measured(lab_model: Any) -> ImportanceMatrix:
    from qformats.runtime.activations import measure

    return measure(lab_model("smollm2-135m"), evaluation_text(), dataset="text", context=CONTEXT, chunks=CHUNKS)


def test_llama_cpp_meets_the_same_activations(
    measured: ImportanceMatrix, lab_model: Any, workshop: Workshop, llama: Any, figure: Any
) -> None:
    from transformers import AutoTokenizer

    from qformats.runtime.activations import chunk_tokens

    folder = lab_model("smollm2-135m")
    path, _ = workshop.convert(folder, "gguf:f32")
    collector = Collector(llama)
    with llama.Llama(path, n_ctx=CONTEXT, on_tensor=collector.callback) as model:
        for ids in chunk_tokens(AutoTokenizer.from_pretrained(folder), evaluation_text(), CONTEXT, CHUNKS):
            model.logits(ids)
    assert collector.sums.keys() == measured.entries.keys()
    worst = 0.0
    for name, sums in collector.sums.items():
        entry = measured.entries[name]
        assert entry.counts.tolist() == [collector.counts[name]] == [CONTEXT * CHUNKS]
        worst = max(worst, float(np.abs(entry.sums[0] - sums).sum() / sums.sum()))
    figure(f"{len(measured.entries)} tensors, largest relative difference {worst:.2g}")
    assert worst < 1e-4


def test_ggml_lays_the_file_out_in_the_same_way(measured: ImportanceMatrix, llama: Any, tmp_path: Path) -> None:
    """ggml reads our file and writes its header again, padding included; the data follows in that order, each tensor padded."""
    some = dict(list(measured.entries.items())[:9])
    some["blk.0.ffn_up_exps.weight"] = Entry(np.ones((4, 32), np.float32), np.array([1, 0, 3, 9]))
    write_imatrix(ImportanceMatrix(some, ("a", "ü"), 3, 96), tmp_path / "ours.gguf")

    class Params(C.Structure):
        _fields_ = [("no_alloc", C.c_bool), ("ctx", C.POINTER(C.c_void_p))]

    base, context = llama.base_library(), C.c_void_p()
    base.gguf_init_from_file.restype, base.gguf_init_from_file.argtypes = C.c_void_p, [C.c_char_p, Params]
    base.gguf_write_to_file.restype, base.gguf_write_to_file.argtypes = C.c_bool, [C.c_void_p, C.c_char_p, C.c_bool]
    gguf = base.gguf_init_from_file(str(tmp_path / "ours.gguf").encode(), Params(False, C.pointer(context)))
    assert gguf and base.gguf_write_to_file(gguf, str(tmp_path / "theirs.gguf").encode(), True)
    header, whole = (tmp_path / "theirs.gguf").read_bytes(), (tmp_path / "ours.gguf").read_bytes()
    assert whole[: len(header)] == header
    data = b""
    for name in sorted(some):
        for values in (some[name].sums, some[name].counts):
            data += values.astype("<f4").tobytes()
            data += bytes(-len(data) % 32)
    assert whole[len(header) :] == data


def test_llama_cpp_rounds_to_the_same_bytes_under_them(lab_model: Any, workshop: Workshop, llama: Any, tmp_path: Path) -> None:
    from qformats.runtime.activations import measure

    folder = lab_model("smollm2-768-slice4")
    floats, _ = workshop.convert(folder, "gguf:f32")
    write_imatrix(measure(folder, evaluation_text(), dataset="text", context=64, chunks=2), tmp_path / "i.gguf")
    matrix = read_imatrix(tmp_path / "i.gguf")
    llama.quantize_file(
        floats, tmp_path / "theirs.gguf", "Q4_K_S", pure=True, imatrix={n: e.importance() for n, e in matrix.entries.items()}
    )
    types = [("token_embd|output", "q8_0")]
    report = convert(floats, tmp_path / "ours.gguf", to="gguf:q4_k", pure=True, imatrix=tmp_path / "i.gguf", tensor_types=types)
    ours, theirs = open_gguf(tmp_path / "ours.gguf").tensors, open_gguf(tmp_path / "theirs.gguf").tensors
    compared = [name for name in ours if name in matrix.entries and ours[name].dtype == theirs[name].dtype == "Q4_K"]
    assert len(compared) == report.weighted > 20
    for name in compared:
        assert ours[name].read() == theirs[name].read(), name


def test_llama_cpp_loads_shards_and_what_is_merged_of_them(lab_model: Any, workshop: Workshop, llama: Any, tmp_path: Path) -> None:
    path, _ = workshop.convert(lab_model("smollm2-768-slice4"), "gguf:f32")
    shards = split_gguf(path, tmp_path / "cut", max_nbytes=path.stat().st_size // 4).paths
    assert len(shards) > 2
    merge_gguf([shards[0]], tmp_path / "whole.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == path.read_bytes()
    logits = []
    for file in (path, shards[0]):
        with llama.Llama(file, n_ctx=32) as model:
            logits.append(model.logits(list(range(1, 20))))
    np.testing.assert_array_equal(logits[0], logits[1])

"""There and back on real checkpoints, and ``verify`` on files with one wrong bit."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Workshop, made, new_codes
from reference import raw_tensors

from converters import verify

CONFIGS = ("config.json", "quantize_config.json", "generation_config.json")


@pytest.mark.parametrize("name", made())
def test_there_and_back(name: str, checkpoint: Any, workshop: Workshop, figure: Any) -> None:
    """AWQ -> GGUF -> AWQ and GPTQ -> GGUF -> GPTQ restore every tensor's bytes and the configuration files."""
    source = checkpoint(name)
    consent = new_codes(name)
    middle, report = workshop.convert(source, "gguf", allow_requantize=consent)
    back, _ = workshop.convert(middle, name.partition("-")[0], allow_requantize=consent)
    assert verify(source, middle, replay=True).ok
    assert verify(middle, back, replay=True).ok
    lost = {line.name for line in report.tensors if line.kind == "requantized"}
    theirs, mine = raw_tensors(source), raw_tensors(back)
    assert set(theirs) == set(mine)
    equal = {k for k, (kind, values) in theirs.items() if mine[k][0] == kind and mine[k][1].tobytes() == values.tobytes()}
    figure(f"{len(equal)} of {len(theirs)} tensors have their bytes again; {len(lost)} had been given new codes")
    if consent:  # new codes cannot come back; the absorbed layers and all floats must, group index and all
        shared = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", *(["down_proj"] if "-8-asym-" in name else []))
        assert {key for key in theirs if not any(part in key for part in shared)} <= equal
        return
    assert equal == set(theirs)
    assert not lost
    for file in CONFIGS:
        if (source / file).exists():
            assert json.loads((back / file).read_text()) == json.loads((source / file).read_text()), file


@pytest.mark.parametrize("name", made(only="awq-gemm-g64-slice"))
def test_an_awq_checkpoint_as_gptq_and_back(name: str, checkpoint: Any, workshop: Workshop) -> None:
    """The same codes and parameters in the other format's layout: no file in between is needed to come back."""
    source = checkpoint(name)
    middle, report = workshop.convert(source, "gptq")
    assert set(report.kinds) <= {"copied", "exact"}
    back, _ = workshop.convert(middle, "awq")
    assert verify(source, middle, replay=True).ok
    theirs, mine = raw_tensors(source), raw_tensors(back)
    assert {k: v.tobytes() for k, (_, v) in theirs.items()} == {k: v.tobytes() for k, (_, v) in mine.items()}


# ---------------------------------------------------------------- one wrong bit


class Places:
    """Byte offsets inside a GGUF by what stands there, as gguf-py finds them."""

    def __init__(self, path: Path) -> None:
        self.reader = gguf.GGUFReader(path)
        self.random = random.Random(20261122)
        self.start = int(self.reader.data.ctypes.data)

    def _block(self) -> tuple[int, int]:
        tensor = self.random.choice([t for t in self.reader.tensors if t.tensor_type.name in ("Q4_0", "Q5_0", "Q4_K")])
        nbytes = int(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])
        return int(tensor.data_offset) + self.random.randrange(int(tensor.n_bytes) // nbytes) * nbytes, nbytes

    def weight(self) -> int:
        at, nbytes = self._block()
        return at + self.random.randrange(nbytes - 16, nbytes)

    def scale(self) -> int:
        return self._block()[0] + self.random.randrange(2)

    def norm(self) -> int:
        tensor = next(t for t in self.reader.tensors if t.name == "blk.1.attn_norm.weight")
        return int(tensor.data_offset) + self.random.randrange(int(tensor.n_bytes))

    def _part(self, key: str, index: int) -> int:
        part: Any = self.reader.fields[key].parts[index]
        return int(part.ctypes.data) - self.start + self.random.randrange(part.nbytes)

    def metadata(self) -> int:
        return self._part("llama.rope.freq_base", -1)

    def key(self) -> int:
        return self._part("llama.embedding_length", 1)

    def tokenizer(self) -> int:
        tokens = self.reader.fields["tokenizer.ggml.tokens"]
        return self._part("tokenizer.ggml.tokens", tokens.data[self.random.randrange(1000, len(tokens.data))])

    def merges(self) -> int:
        merges = self.reader.fields["tokenizer.ggml.merges"]
        return self._part("tokenizer.ggml.merges", merges.data[self.random.randrange(len(merges.data))])

    def record(self) -> int:
        return self._part("qformats.provenance", -1)

    def padding(self) -> int:
        before = min(self.reader.tensors, key=lambda t: t.data_offset)
        return int(before.data_offset) - 1

    def tensor_name(self) -> int:
        part: Any = self.random.choice(self.reader.tensors).field.parts[1]
        return int(part.ctypes.data) - self.start + self.random.randrange(part.nbytes)


WHERE = ("weight", "scale", "norm", "metadata", "key", "tokenizer", "merges", "record", "tensor_name")


@pytest.fixture(scope="module")
def damaged(checkpoint: Any, workshop: Workshop) -> Iterator[tuple[Path, Path, Places]]:
    source = checkpoint("awq-gemm-g64-slice")
    made_file, _ = workshop.convert(source, "gguf")
    copy = workshop.folder / "damaged.gguf"
    shutil.copyfile(made_file, copy)
    yield source, copy, Places(made_file)


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ (1 << bit)]))


@pytest.mark.real
@pytest.mark.parametrize("where", WHERE)
def test_verify_finds_one_wrong_bit(where: str, damaged: tuple[Path, Path, Places]) -> None:
    source, copy, places = damaged
    at, bit = getattr(places, where)(), places.random.randrange(8)
    flip(copy, at, bit)
    try:
        result = verify(source, copy)
    finally:
        flip(copy, at, bit)
    assert not result.ok, f"bit {bit} of byte {at}"
    assert result.mismatches
    if where in ("weight", "scale", "norm"):
        assert any(m["offset_bytes"] == at for m in result.mismatches)


@pytest.mark.real
def test_the_command_exits_with_three(damaged: tuple[Path, Path, Places]) -> None:
    """``qconvert verify``: 0 on the file as it was made, 3 on one wrong bit; the file itself is left alone."""
    source, copy, places = damaged
    command = [sys.executable, "-m", "converters.cli", "verify", str(source), str(copy)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    at = places.scale()
    flip(copy, at, 3)
    before = np.frombuffer(copy.read_bytes(), np.uint8).copy()
    done = subprocess.run(command, capture_output=True, text=True)
    assert np.array_equal(np.frombuffer(copy.read_bytes(), np.uint8), before)
    flip(copy, at, 3)
    assert done.returncode == 3, done.stderr
    assert done.stdout + done.stderr

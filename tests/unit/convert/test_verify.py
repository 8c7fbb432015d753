"""verify finds every flipped bit, in weights, parameters, header, metadata, record, padding and side files; without a record it says so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import converted, header, load, planned, ready, store, stripped_gguf

from converters.digests import DIGESTS_KEY
from converters.verify import VerifyResult, verify
from qformats.checkpoint import PROVENANCE_KEY, open_checkpoint
from qformats.errors import BadFile, Mismatch, QFormatError

SYM, ASYM = "gptq/4b-g32-sym", "gptq/4b-g32-asym-v1"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verify")
    converted(ready(SYM, directory), directory / "model.gguf", "gguf")
    converted(ready(SYM, directory), directory / "awq", "awq")
    converted(ready(ASYM, directory), directory / "asym.gguf", "gguf:q4_1")
    return directory


@pytest.fixture(scope="module")
def source(work: Path) -> Path:
    return ready(SYM, work)


def is_found(source: Path, output: Path) -> bool:
    """Whether verify says no, or refuses to read what it is shown."""
    try:
        result = verify(source, output, workers=1)
    except QFormatError:
        return True
    if not result.ok:
        with pytest.raises(Mismatch) as caught:
            result.raise_if_different(output)
        assert caught.value.exit_code == 3
    return not result.ok


def flips(file: Path, positions: Iterator[int] | range) -> Iterator[tuple[int, int]]:
    """Flip one bit a position (which one depends on the position), yield, and put it back."""
    with file.open("r+b") as handle:
        for at in positions:
            handle.seek(at)
            byte = handle.read(1)[0]
            bit = (at * 5 + at // 7) % 8
            handle.seek(at)
            handle.write(bytes([byte ^ (1 << bit)]))
            handle.flush()
            yield at, bit
            handle.seek(at)
            handle.write(bytes([byte]))
            handle.flush()


def missed(source: Path, output: Path, file: Path, positions: range) -> list[tuple[int, int]]:
    return [where for where in flips(file, positions) if not is_found(source, output)]


@pytest.mark.parametrize("replay", [False, True])
def test_an_untouched_output_is_good(work: Path, source: Path, replay: bool) -> None:
    for output in (work / "model.gguf", work / "awq"):
        result = verify(source, output, replay=replay)
        assert result.ok and result.method == ("replay" if replay else "digests") and not result.mismatches and not result.unseen
        assert result.compared_nbytes >= (output / "model.safetensors" if output.is_dir() else output).stat().st_size
        result.raise_if_different(output)


def test_a_renamed_output_is_good(work: Path, source: Path, tmp_path: Path) -> None:
    assert verify(source, Path(shutil.copy(work / "model.gguf", tmp_path / "other.gguf"))).method == "digests"
    assert verify(source, Path(shutil.copytree(work / "awq", tmp_path / "other"))).method == "digests"


def test_a_source_stored_otherwise_is_replayed(work: Path, source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    tensors = load(copy / "model.safetensors")
    store(copy / "model.safetensors", dict(reversed(tensors.items())), {"format": "pt", "note": "another writer"})
    result = verify(copy, work / "model.gguf")
    assert result.ok and result.method == "replay"


def test_bits_of_the_digests(work: Path, source: Path, tmp_path: Path) -> None:
    for output in (Path(shutil.copy(work / "model.gguf", tmp_path)), Path(shutil.copytree(work / "awq", tmp_path / "awq"))):
        file = output / "model.safetensors" if output.is_dir() else output
        at = file.read_bytes().index(DIGESTS_KEY.encode())
        assert missed(source, output, file, range(at, at + len(DIGESTS_KEY) + 110, 3)) == []


def test_damage_that_the_digests_saw_has_a_place(work: Path, source: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(work / "awq", tmp_path / "awq"))
    for _ in flips(output / "tokenizer.json", iter([20])):
        result = verify(source, output)
        assert not result.ok and [m["file"] for m in result.mismatches] == ["tokenizer.json"]
    at = (output / "model.safetensors").read_bytes().index(b"source=") + 10
    for _ in flips(output / "model.safetensors", iter([at])):
        result = verify(source, output)
        assert not result.ok and "digests" in result.mismatches[0]["detail"]


def test_bits_of_the_first_bytes_of_a_gguf(work: Path, source: Path, tmp_path: Path) -> None:
    output = Path(shutil.copy(work / "model.gguf", tmp_path))
    assert missed(source, output, output, range(64)) == []
    assert missed(source, output, output, range(64, 256, 5)) == []


def test_bits_all_over_a_gguf(work: Path, source: Path, tmp_path: Path) -> None:
    output = Path(shutil.copy(work / "model.gguf", tmp_path))
    size = output.stat().st_size
    assert missed(source, output, output, range(256, size, size // 120)) == []
    assert missed(source, output, output, range(size - 8, size, 3)) == []


def test_bits_of_a_gguf_with_offsets(work: Path, tmp_path: Path) -> None:
    output = Path(shutil.copy(work / "asym.gguf", tmp_path))
    size = output.stat().st_size
    assert missed(ready(ASYM, work), output, output, range(777, size, size // 60)) == []


def test_padding_between_tensors(work: Path, source: Path, tmp_path: Path) -> None:
    output = Path(shutil.copy(work / "model.gguf", tmp_path))
    plan = planned(source, "gguf")
    spans = sorted((p.offset, p.offset + p.nbytes) for p in plan.output.parts.values())
    ends = [len(plan.output.layouts[""].header)] + [stop for _, stop in spans]
    holes = [(stop, start) for stop, (start, _) in zip(ends, spans) if start > stop]
    plan.checkpoint.close()
    for stop, start in holes:
        assert missed(source, output, output, range(stop, start)) == []


def test_every_bit_of_the_record(work: Path, source: Path, tmp_path: Path) -> None:
    output = Path(shutil.copy(work / "model.gguf", tmp_path))
    at = output.read_bytes().index(PROVENANCE_KEY.encode())
    assert missed(source, output, output, range(at, at + len(PROVENANCE_KEY) + 14)) == []
    assert missed(source, output, output, range(at + 50, at + 2000, 37)) == []


def test_bits_of_a_directory(work: Path, source: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(work / "awq", tmp_path / "awq"))
    weights = output / "model.safetensors"
    size = weights.stat().st_size
    assert missed(source, output, weights, range(0, 120, 3)) == []
    assert missed(source, output, weights, range(120, size, size // 90)) == []


def test_bits_of_side_files(work: Path, source: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(work / "awq", tmp_path / "awq"))
    files = [f for f in sorted(output.iterdir()) if f.name != "model.safetensors"]
    assert {"config.json", "tokenizer.json"} <= {f.name for f in files}
    for file in files:
        size = file.stat().st_size
        assert missed(source, output, file, range(0, size, max(1, size // 12))) == []


@pytest.mark.parametrize("change", [-1, -64, 1, 64])
@pytest.mark.parametrize("name", ["model.gguf", "awq"])
def test_a_truncated_or_extended_output(work: Path, source: Path, tmp_path: Path, change: int, name: str) -> None:
    origin = work / name
    output = Path(shutil.copytree(origin, tmp_path / name) if origin.is_dir() else shutil.copy(origin, tmp_path))
    file = output / "model.safetensors" if output.is_dir() else output
    os.truncate(file, file.stat().st_size + change)
    assert is_found(source, output)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_missing_side_file(work: Path, source: Path, tmp_path: Path, name: str) -> None:
    output = Path(shutil.copytree(work / "awq", tmp_path / "awq"))
    (output / name).unlink()
    assert is_found(source, output)


def test_another_source_is_a_mismatch(work: Path) -> None:
    assert is_found(ready(ASYM, work), work / "model.gguf")
    assert is_found(ready("dense/llama", work), work / "model.gguf")


def test_a_changed_source_is_a_mismatch(work: Path, source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    file = copy / "model.safetensors"
    size = file.stat().st_size
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with open_checkpoint(copy) as checkpoint:
        read = [(raw.offset, raw.offset + raw.nbytes) for n, raw in checkpoint.raw.items() if not n.endswith(("qzeros", "g_idx"))]
    positions = [at for at in range(start, size, size // 40) if any(a <= at < b for a, b in read)]
    for at, bit in flips(file, iter(positions)):
        assert is_found(copy, work / "model.gguf"), (at, bit)


def test_a_missing_output_is_said_so(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile) as caught:
        verify(source, tmp_path / "nothing.gguf")
    assert caught.value.code == "not-found"


def test_the_place_of_a_difference_is_named(work: Path, source: Path, tmp_path: Path) -> None:
    output = Path(shutil.copy(work / "model.gguf", tmp_path))
    with open_checkpoint(output) as opened:
        raw = opened.raw["blk.0.attn_k.weight"]
        at = raw.offset + 20
    for _ in flips(output, iter([at])):
        result = verify(source, output)
        assert [m["tensor"] for m in result.mismatches] == ["blk.0.attn_k.weight"]
        assert result.mismatches[0]["offset_bytes"] == at
        assert result.to_json()["mismatches"] == result.mismatches and result.to_json()["ok"] is False


# ---------------------------------------------------------------- without a record


def stripped_directory(origin: Path, output: Path) -> Path:
    shutil.copytree(origin, output)
    metadata = {k: v for k, v in header(output / "model.safetensors")["__metadata__"].items() if k != PROVENANCE_KEY}
    store(output / "model.safetensors", load(output / "model.safetensors"), metadata)
    return output


def check_by_values(result: VerifyResult) -> None:
    assert result.method == "values" and len(result.unseen) == 1 and "no provenance record" in result.unseen[0]


def test_without_a_record_values_are_compared(work: Path, source: Path, tmp_path: Path) -> None:
    output = stripped_gguf(work / "model.gguf", tmp_path / "bare.gguf")
    result = verify(source, output)
    check_by_values(result)
    assert result.ok and result.compared_nbytes > 0
    with open_checkpoint(output) as opened:
        places = {name: raw.offset + raw.nbytes - 1 for name, raw in opened.raw.items()}
    for name, at in places.items():
        for _ in flips(output, iter([at])):
            found = verify(source, output)
            check_by_values(found)
            assert [m["tensor"] for m in found.mismatches] == [name]


def test_without_a_record_a_directory_is_compared_by_values(work: Path, source: Path, tmp_path: Path) -> None:
    output = stripped_directory(work / "awq", tmp_path / "bare")
    result = verify(source, output)
    check_by_values(result)
    assert result.ok
    with open_checkpoint(output) as opened:
        at = opened.raw["model.layers.0.mlp.up_proj.scales"].offset
    for _ in flips(output / "model.safetensors", iter([at])):
        assert [m["tensor"] for m in verify(source, output).mismatches] == ["model.layers.0.mlp.up_proj.weight"]


def test_without_a_record_a_lost_tensor_is_found(work: Path, source: Path, tmp_path: Path) -> None:
    output = stripped_directory(work / "awq", tmp_path / "bare")
    tensors = load(output / "model.safetensors")
    tensors.pop("model.norm.weight")
    store(output / "model.safetensors", tensors, {"format": "pt"})
    assert is_found(source, output)

"""Carrying out a plan: the same bytes for any number of workers, and on any failure one error, nothing left, the source untouched."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import converted, digest, names_in, planned, ready

from converters import convert
from converters.execute import execute
from converters.plan import Plan
from qformats import registry
from qformats.errors import BadFile, OutputError, QFormatError, UsageError, WouldLose

SYM, ASYM, ACT, MOE, AWQ = "gptq/4b-g32-sym", "gptq/4b-g32-asym-v1", "gptq/4b-g64-asym-act-v2", "gptq/moe-qwen3", "awq/gemm-g32"
TARGETS = ("gguf", "awq")  # one file, one directory


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("execute")


@pytest.fixture
def source(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready(SYM, work), tmp_path / "source"))


@pytest.mark.parametrize("path", [SYM, ASYM, ACT, MOE, AWQ])
@pytest.mark.parametrize("to", ["gguf", "gguf:q8_0", "hf:f16"])
def test_bytes_do_not_depend_on_workers_or_row_ranges(
    path: str, to: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, digests = ready(path, work), set()
    for workers in (1, 2, 5):
        converted(origin, tmp_path / f"out-{workers}", to, workers=workers)
        digests.add(digest(tmp_path / f"out-{workers}"))
    monkeypatch.setattr("converters.sources._CHUNK_WEIGHTS", 32 * 64)  # many row ranges a tensor
    monkeypatch.setattr("converters.sources._SLAB_NBYTES", 1000)  # read from the file range by range
    converted(origin, tmp_path / "out-ranges", to, workers=3)
    digests.add(digest(tmp_path / "out-ranges"))
    assert len(digests) == 1


@pytest.mark.parametrize("path", [SYM, ASYM, MOE, AWQ])
def test_way_back_does_not_depend_on_row_ranges(path: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = path.partition("/")[0]
    converted(ready(path, work), tmp_path / "there.gguf", "gguf")
    converted(tmp_path / "there.gguf", tmp_path / "whole", to, workers=1)
    monkeypatch.setattr("converters.sources._CHUNK_WEIGHTS", 32 * 64)
    monkeypatch.setattr("converters.sources._SLAB_NBYTES", 1000)
    converted(tmp_path / "there.gguf", tmp_path / "ranges", to, workers=5)
    assert digest(tmp_path / "whole") == digest(tmp_path / "ranges")


@pytest.mark.parametrize("to", TARGETS)
def test_an_existing_destination_is_kept_unless_overwriting_is_allowed(source: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    converted(source, out, to)
    first = digest(out)
    with pytest.raises(OutputError) as caught:
        converted(source, out, "gguf:q8_0" if to == "gguf" else to)
    assert caught.value.code == "exists" and digest(out) == first
    converted(source, out, "gguf:q8_0" if to == "gguf" else "gptq", overwrite=True)
    assert digest(out) != first
    assert names_in(tmp_path) == ["out", "source"]


def test_a_directory_that_is_no_checkpoint_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(OutputError):
        converted(source, tmp_path / "home", "awq", overwrite=True)
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"


@pytest.mark.parametrize("place", ["source", "source/out", "source/model.safetensors", "link", "."])
@pytest.mark.parametrize("to", TARGETS)
def test_source_and_destination_may_not_meet(source: Path, tmp_path: Path, place: str, to: str) -> None:
    (tmp_path / "link").symlink_to(source)
    before = digest(source)
    with pytest.raises(OutputError) as caught:
        converted(source, tmp_path / place, to, overwrite=True)
    assert caught.value.code == "same-file"
    assert digest(source) == before and names_in(tmp_path) == ["link", "source"]


def test_a_gguf_may_not_be_written_over_itself(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "model.gguf"
    converted(source, there, "gguf")
    os.link(there, tmp_path / "other-name.gguf")
    before = digest(there)
    for place in (there, tmp_path / "other-name.gguf"):
        with pytest.raises(OutputError) as caught:
            converted(there, place, "gguf:q8_0", overwrite=True)
        assert caught.value.code == "same-file" and digest(there) == before


@pytest.mark.parametrize("place", ["missing/out", "file/out", "x" * 300, "x" * 250, "a\0b"], ids=["missing", "file", "300", "250", "zero"])
@pytest.mark.parametrize("to", TARGETS)
def test_an_unwritable_destination(source: Path, tmp_path: Path, place: str, to: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(OutputError) as caught:
        converted(source, tmp_path / place, to)
    assert caught.value.code == "unwritable" and names_in(tmp_path) == ["file", "source"]


@pytest.mark.parametrize("to", TARGETS)
def test_only_files_are_replaced(source: Path, tmp_path: Path, to: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError) as caught:
        converted(source, tmp_path / "pipe", to, overwrite=True)
    assert caught.value.code == "exists" and (tmp_path / "pipe").is_fifo() and names_in(tmp_path) == ["pipe", "source"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(OutputError) as caught:
        converted(source, tmp_path / "closed" / "out.gguf", "gguf")
    assert caught.value.code == "unwritable"


@pytest.mark.parametrize("to", TARGETS)
def test_a_full_disk_is_noticed_first(source: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qformats.containers.atomic._free_nbytes", lambda directory: 1000)
    with pytest.raises(OutputError) as caught:
        converted(source, tmp_path / "out", to)
    assert caught.value.code == "no-space" and names_in(tmp_path) == ["source"]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_disk_that_fails_while_the_rest_is_written(
    source: Path, tmp_path: Path, to: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written goes to the disk meanwhile; the failure of any such flush is the one error, and nothing is left."""
    done: list[int] = []

    def fails(fd: int) -> None:
        done.append(fd)
        if len(done) > calls:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("converters.execute._FLUSH_NBYTES", 1)
    monkeypatch.setattr("qformats.containers.atomic.os.fsync", fails)
    with pytest.raises(OutputError) as caught:
        converted(source, tmp_path / "out", to)
    assert caught.value.code == "write-failed" and caught.value.exit_code == 4
    assert names_in(tmp_path) == ["source"]


def test_a_header_plan_is_not_carried_out(source: Path, tmp_path: Path) -> None:
    plan = planned(source, "gguf", header_only=True)
    with plan.checkpoint, pytest.raises(UsageError) as caught:
        execute(plan, tmp_path / "out.gguf")
    assert caught.value.code == "plan-depth" and names_in(tmp_path) == ["source"]


# ---------------------------------------------------------------- failures on the way


def run(plan: Plan, out: Path, **options: Any) -> None:
    with plan.checkpoint:
        execute(plan, out, **options)


@pytest.mark.parametrize("error", [BadFile("invented", "broken"), RuntimeError("not ours"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("to", TARGETS)
def test_a_reader_that_fails_in_the_middle(
    source: Path, tmp_path: Path, to: str, workers: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plan = digest(source), planned(source, to)
    form, calls = registry.format_module("gptq"), []
    real = form.read

    def read(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(form, "read", read)
    with pytest.raises(type(error)):
        run(plan, tmp_path / "out", workers=workers)
    assert len(calls) >= 4
    assert names_in(tmp_path) == ["source"] and digest(source) == before


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("left", [0, 9000])
def test_a_source_truncated_after_planning(source: Path, tmp_path: Path, to: str, left: int) -> None:
    plan = planned(source, to)
    os.truncate(source / "model.safetensors", left)
    with pytest.raises(BadFile) as caught:
        run(plan, tmp_path / "out", workers=2)
    assert caught.value.code == "truncated" and caught.value.exit_code == 5 and caught.value.tensor
    assert names_in(tmp_path) == ["source"]


@pytest.mark.parametrize("to", TARGETS)
def test_a_source_truncated_while_it_is_read(source: Path, tmp_path: Path, to: str) -> None:
    plan = planned(source, to)
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        if not seen:
            os.truncate(source / "model.safetensors", 5000)
        seen.append((done, total))

    with pytest.raises(QFormatError) as caught:
        run(plan, tmp_path / "out", workers=1, progress=progress)
    assert caught.value.code == "truncated" and seen
    assert names_in(tmp_path) == ["source"]


@pytest.mark.parametrize("to", TARGETS)
def test_a_source_written_to_while_it_is_read(source: Path, tmp_path: Path, to: str) -> None:
    """The digests would speak of bytes that were never converted."""
    plan, file = planned(source, to), source / "model.safetensors"

    def progress(done: int, total: int) -> None:
        with file.open("r+b") as handle:
            last = file.read_bytes()[-1:]
            handle.seek(-1, os.SEEK_END)
            handle.write(last)

    with pytest.raises(BadFile) as caught:
        run(plan, tmp_path / "out", workers=1, progress=progress)
    assert caught.value.code == "changed" and caught.value.exit_code == 5
    assert names_in(tmp_path) == ["source"]


def test_a_plan_that_no_longer_fits_is_an_error(source: Path, tmp_path: Path) -> None:
    plan = planned(source, "gguf")
    name = "model.layers.0.mlp.up_proj.qzeros"
    raw = plan.checkpoint.raw[name]
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(raw.offset)
        file.write(bytes([0x22]) * raw.nbytes)
    with pytest.raises((WouldLose, BadFile)) as caught:
        run(plan, tmp_path / "out", workers=2)
    assert caught.value.code in ("plan-changed", "source-changed")
    assert names_in(tmp_path) == ["source"]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("workers", [1, 4])
def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path, to: str, workers: int) -> None:
    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = digest(source)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", to=to, workers=workers, progress=progress)
    assert names_in(tmp_path) == ["source"] and digest(source) == before


def test_an_interrupted_overwrite_keeps_the_old_output(source: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for to, out in (("gguf", tmp_path / "old.gguf"), ("awq", tmp_path / "old")):
        converted(source, out, to)
        before = digest(out)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, to=to, overwrite=True, progress=progress)
        assert digest(out) == before
    assert names_in(tmp_path) == ["old", "old.gguf", "source"]


@pytest.mark.parametrize("to", TARGETS)
def test_progress_counts_up_to_the_total(source: Path, tmp_path: Path, to: str) -> None:
    seen: list[tuple[int, int]] = []
    convert(source, tmp_path / "out", to=to, workers=3, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]


def test_torch_threads_are_as_before(source: Path, tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    converted(source, tmp_path / "out", "gguf")
    assert torch.get_num_threads() == before

"""Splitting, merging and editing GGUF files: bytes come back, other readers agree, and what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from converters import convert, verify
from converters.cli import qconvert
from converters.gguf_edit import edit_gguf, merge_gguf, split_gguf
from converters.metadata_words import Assignment, assigned, parse_assignment
from qformats.containers.gguf import TensorInfo, Value, layout_gguf, open_gguf
from qformats.errors import BadFile, OutputError, QFormatError, UsageError

FIXTURES = Path(__file__).parents[3] / "fixtures"
SMALL = FIXTURES / "containers" / "small.gguf"
ALIGNED = FIXTURES / "containers" / "aligned.gguf"
BIG = FIXTURES / "containers" / "big-endian.gguf"
SHARD = FIXTURES / "containers" / "split-00001-of-00003.gguf"


def model(path: Path, count: int = 5, metadata: dict[str, Value] | None = None) -> Path:
    """Tensors of 64, 128, … bytes, each filled with its number."""
    infos = [TensorInfo(f"t{i}", "F32", (16 * (i + 1),)) for i in range(count)]
    layout = layout_gguf({"general.architecture": Value("str", "x"), **(metadata or {})}, infos)
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for i, info in enumerate(infos):
        at = layout.offsets[info.name]
        data[at : at + layout.nbytes[info.name]] = bytes([i + 1]) * layout.nbytes[info.name]
    path.write_bytes(data)
    return path


def content(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (raw.dtype, raw.shape, raw.read()) for name, raw in open_gguf(path).tensors.items()}


def code(call: Any) -> str:
    with pytest.raises(QFormatError) as error:
        call()
    return error.value.code


# ---------------------------------------------------------------- split and merge


@pytest.mark.parametrize("source", [SMALL, ALIGNED], ids=["default alignment", "alignment 64"])
@pytest.mark.parametrize("limit", [{"max_tensors": 1}, {"max_tensors": 2}, {"max_nbytes": 900}, {"max_tensors": 99}], ids=str)
def test_shards_put_together_again_are_the_same_file(source: Path, limit: dict[str, Any], tmp_path: Path) -> None:
    written = split_gguf(source, tmp_path / "cut.gguf", **limit)
    assert [p.name for p in written.paths] == [f"cut-{i + 1:05d}-of-{len(written.paths):05d}.gguf" for i in range(len(written.paths))]
    assert sorted(tmp_path.iterdir()) == sorted(written.paths)
    merge_gguf([written.paths[0]], tmp_path / "whole.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == source.read_bytes()


def test_the_keys_are_in_the_first_shard_only_in_gguf_splits_types_and_order(tmp_path: Path) -> None:
    paths = split_gguf(model(tmp_path / "m.gguf"), tmp_path / "m", max_tensors=2).paths
    for number, path in enumerate(paths):
        reader = gguf.GGUFReader(path)
        fields = {n: (f.types[0].name, f.contents()) for n, f in reader.fields.items() if not n.startswith("GGUF.")}
        own = {"split.no": ("UINT16", number), "split.tensors.count": ("INT32", 5), "split.count": ("UINT16", 3)}
        assert fields == ({"general.architecture": ("STRING", "x"), **own} if number == 0 else own)
        assert list(fields)[-3:] == list(own)
        assert [t.name for t in reader.tensors] == [["t0", "t1"], ["t2", "t3"], ["t4"]][number]


@pytest.mark.parametrize(
    ("limit", "groups"),
    [(64, [1, 1, 1, 1, 1]), (192, [2, 1, 1, 1]), (383, [2, 1, 1, 1]), (448, [3, 1, 1]), (640, [4, 1]), (960, [5])],
)
def test_a_shard_holds_as_many_whole_tensors_as_fit(limit: int, groups: list[int], tmp_path: Path) -> None:
    written = split_gguf(model(tmp_path / "m.gguf"), tmp_path / "m", max_nbytes=limit)
    assert [len(gguf.GGUFReader(path).tensors) for path in written.paths] == groups


def test_the_first_shard_may_be_left_to_the_metadata(tmp_path: Path) -> None:
    source = model(tmp_path / "m.gguf")
    paths = split_gguf(source, tmp_path / "m", max_tensors=3, no_tensor_first=True).paths
    assert len(paths) == 3 and not gguf.GGUFReader(paths[0]).tensors
    merge_gguf(paths, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == source.read_bytes()


def test_shards_of_gguf_py_are_merged(tmp_path: Path) -> None:
    merge_gguf([SHARD], tmp_path / "whole.gguf")
    opened = open_gguf(tmp_path / "whole.gguf")
    assert opened.shards == 1 and not any(key.startswith("split.") for key in opened.metadata)
    assert content(tmp_path / "whole.gguf") == content(SHARD)
    assert len(gguf.GGUFReader(tmp_path / "whole.gguf").tensors) == len(opened.tensors)


def test_a_set_of_shards_is_split_anew(tmp_path: Path) -> None:
    written = split_gguf(SHARD, tmp_path / "new", max_tensors=1)
    assert content(written.paths[-1]) == content(SHARD)


def test_shards_given_by_name_need_neither_order_nor_names(tmp_path: Path) -> None:
    source = model(tmp_path / "m.gguf")
    paths = split_gguf(source, tmp_path / "m", max_tensors=2).paths
    moved = [path.rename(tmp_path / f"part{i}") for i, path in enumerate(paths)]
    merge_gguf([moved[2], moved[0], moved[1]], tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == source.read_bytes()
    assert code(lambda: merge_gguf(moved[:2], tmp_path / "b.gguf")) == "gguf-shard-missing"
    assert code(lambda: merge_gguf([moved[0], moved[1], moved[1]], tmp_path / "b.gguf")) == "gguf-shard-keys"


def test_a_set_that_is_not_whole_or_not_one_is_refused(tmp_path: Path) -> None:
    a = split_gguf(model(tmp_path / "a.gguf"), tmp_path / "a", max_tensors=2).paths
    b = split_gguf(model(tmp_path / "b.gguf", 7), tmp_path / "b", max_tensors=3).paths
    shutil.copy(b[1], a[1])
    with pytest.raises(BadFile):
        merge_gguf([a[0]], tmp_path / "c.gguf")
    a[1].unlink()
    assert code(lambda: merge_gguf([a[0]], tmp_path / "c.gguf")) == "gguf-shard-missing"
    assert code(lambda: merge_gguf([SMALL], tmp_path / "c.gguf")) == "not-split"
    assert not (tmp_path / "c.gguf").exists()


def test_wrong_limits_are_refused(tmp_path: Path) -> None:
    assert code(lambda: split_gguf(SMALL, tmp_path / "x")) == "split-limit"
    assert code(lambda: split_gguf(SMALL, tmp_path / "x", max_nbytes=1, max_tensors=1)) == "split-limit"
    assert code(lambda: split_gguf(SMALL, tmp_path / "x", max_tensors=0)) == "split-limit"


def test_big_endian_files_are_refused_by_name(tmp_path: Path) -> None:
    assert code(lambda: split_gguf(BIG, tmp_path / "x", max_tensors=1)) == "gguf-big-endian"
    assert code(lambda: edit_gguf(BIG, tmp_path / "x")) == "gguf-big-endian"


def test_nothing_is_overwritten_unasked_and_nothing_half_done_is_left(tmp_path: Path) -> None:
    source = model(tmp_path / "m.gguf")
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError) as error:
        split_gguf(source, tmp_path / "m", max_tensors=2)
    assert error.value.code == "exists"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-00002-of-00003.gguf", "m.gguf"]
    split_gguf(source, tmp_path / "m", max_tensors=2, overwrite=True)
    assert code(lambda: merge_gguf([tmp_path / "m-00001-of-00003.gguf"], source)) == "exists"
    same = tmp_path / "m-00002-of-00003.gguf"
    assert code(lambda: merge_gguf([tmp_path / "m-00001-of-00003.gguf"], same, overwrite=True)) == "same-file"
    assert code(lambda: edit_gguf(source, source, overwrite=True)) == "same-file"


def test_a_failure_takes_finished_shards_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "m.gguf")
    from converters import gguf_edit

    fill, calls = gguf_edit._fill, []

    def failing(*args: Any) -> int:
        calls.append(1)
        if len(calls) == 3:
            raise OutputError("no-space", "full")
        return fill(*args)

    monkeypatch.setattr(gguf_edit, "_fill", failing)
    assert code(lambda: split_gguf(source, tmp_path / "m", max_tensors=2)) == "no-space"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


# ---------------------------------------------------------------- metadata


def test_keys_are_set_renamed_and_removed_and_tensors_stay(tmp_path: Path) -> None:
    words = ["k.u8=7", "k.f32=2", 'k.words=["x", "y"]', "new.count=12", "new.name=a=b", "k.i8:str=text"]
    changes = [parse_assignment(word) for word in words]
    edit_gguf(SMALL, tmp_path / "e.gguf", assignments=changes, removed=["k.i16"], renamed=[("k.u16", "renamed")])
    before, after = open_gguf(SMALL), open_gguf(tmp_path / "e.gguf")
    expected = {("renamed" if k == "k.u16" else k): v for k, v in before.metadata.items() if k != "k.i16"}
    expected |= {"k.u8": Value("u8", 7), "k.f32": Value("f32", 2.0), "k.i8": Value("str", "text")}
    expected |= {"k.words": Value("[str]", ("x", "y")), "new.count": Value("u32", 12), "new.name": Value("str", "a=b")}
    assert list(after.metadata) == list(expected)
    assert {k: (v.type, list(v.value) if v.type[0] == "[" else v.value) for k, v in after.metadata.items()} == {
        k: (v.type, list(v.value) if v.type[0] == "[" else v.value) for k, v in expected.items()
    }
    assert content(tmp_path / "e.gguf") == content(SMALL)
    assert gguf.GGUFReader(tmp_path / "e.gguf").fields["new.count"].contents() == 12


def test_without_changes_the_copy_is_the_same_file(tmp_path: Path) -> None:
    edit_gguf(ALIGNED, tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == ALIGNED.read_bytes()


def test_tensors_are_renamed_in_place(tmp_path: Path) -> None:
    edit_gguf(SMALL, tmp_path / "e.gguf", renamed_tensors=[("half.weight", "other.weight")])
    names = [name if name != "half.weight" else "other.weight" for name in content(SMALL)]
    assert list(content(tmp_path / "e.gguf")) == names
    assert content(tmp_path / "e.gguf")["other.weight"] == content(SMALL)["half.weight"]


def test_an_alignment_that_is_set_is_kept_to(tmp_path: Path) -> None:
    edit_gguf(SMALL, tmp_path / "e.gguf", assignments=[parse_assignment("general.alignment=128")])
    opened = open_gguf(tmp_path / "e.gguf")
    assert opened.alignment == 128 and content(tmp_path / "e.gguf") == content(SMALL)
    assert code(lambda: edit_gguf(SMALL, tmp_path / "x.gguf", assignments=[parse_assignment("general.alignment=48")])) == "gguf-alignment"


def test_changes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    assert code(lambda: edit_gguf(SMALL, out, removed=["nothing"])) == "metadata-missing"
    assert code(lambda: edit_gguf(SMALL, out, renamed=[("nothing", "x")])) == "metadata-missing"
    assert code(lambda: edit_gguf(SMALL, out, renamed=[("k.u8", "k.i8")])) == "metadata-taken"
    assert code(lambda: edit_gguf(SMALL, out, renamed=[("k.u8", "split.no")])) == "metadata-reserved"
    assert code(lambda: edit_gguf(SMALL, out, renamed_tensors=[("half.weight", "norm.weight")])) == "metadata-taken"
    assert code(lambda: edit_gguf(SMALL, out, renamed_tensors=[("half.weight", "x" * 64)])) == "gguf-string-too-long"
    assert not out.exists()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=1", Value("u32", 1)), ("a=-1", Value("i32", -1)), ("a=4294967296", Value("u64", 1 << 32)),
        ("a=-3000000000", Value("i64", -3000000000)),
        ("a=0.5", Value("f32", 0.5)), ("a=true", Value("bool", True)), ("a=True", Value("str", "True")), ("a=1_000", Value("str", "1_000")),
        ("a= 1", Value("str", " 1")), ("a=", Value("str", "")), ("a=nan", Value("str", "nan")), ("a:f64=1e300", Value("f64", 1e300)),
        ("a:uint8=255", Value("u8", 255)), ("a:string=1", Value("str", "1")), ("a:[float32]=[1, 2.5]", Value("[f32]", (1, 2.5))),
        ("a:[str]=[]", Value("[str]", ())), ("a:bool=false", Value("bool", False)),
    ],
)  # fmt: skip
def test_words_become_values(word: str, expected: Value) -> None:
    assert assigned({}, parse_assignment(word)) == {"a": expected}


@pytest.mark.parametrize("word", ["a", "=1", ":u8=1", "k\0=1"])
def test_words_that_are_no_assignment(word: str) -> None:
    assert code(lambda: parse_assignment(word)) == "metadata-form"


WRONG = ["a:u8=256", "a:u8=-1", "a:u8=x", "a:bool=1", "a:f32=x", "a:f32=1e300", "a:[u8]=1", "a:[u8]=[300]", "a:[u8]=[true]", "a:[str]=[1]"]


@pytest.mark.parametrize("word", [*WRONG, "a:[u8]=" + "[" * 9999], ids=[*WRONG, "deep"])
def test_values_that_do_not_fit_their_type(word: str) -> None:
    assert code(lambda: assigned({}, parse_assignment(word))) == "metadata-value"


def test_reserved_keys_and_unknown_types() -> None:
    assert code(lambda: parse_assignment("split.no=1")) == "metadata-reserved"
    assert code(lambda: parse_assignment("qformats.provenance=x")) == "metadata-reserved"
    assert code(lambda: parse_assignment("a:u9=1")) == "metadata-type"


def test_the_type_of_a_key_stays() -> None:
    assert assigned({"a": Value("str", "x")}, Assignment("a", None, "1")) == {"a": Value("str", "1")}
    with pytest.raises(UsageError):
        assigned({"a": Value("u8", 1)}, Assignment("a", None, "x"))


# ---------------------------------------------------------------- beside conversions


def test_a_conversion_from_gguf_to_gguf_keeps_every_byte_and_key(tmp_path: Path) -> None:
    source = model(tmp_path / "m.gguf", metadata={"some.key": Value("[i16]", (1, -2)), "general.alignment": Value("u32", 64)})
    report = convert(source, tmp_path / "c.gguf", to="gguf")
    assert set(report.kinds) == {"copied"}
    before, after = open_gguf(source), open_gguf(tmp_path / "c.gguf")
    assert content(tmp_path / "c.gguf") == content(source) and list(after.tensors) == list(before.tensors)
    assert {k: v for k, v in after.metadata.items() if not k.startswith("qformats.")} == before.metadata
    assert verify(source, tmp_path / "c.gguf").ok


def test_what_a_conversion_recorded_survives_cutting_and_merging_and_digests_end_with_an_edit(tmp_path: Path) -> None:
    awq = FIXTURES / "awq" / "gemm-g32"
    convert(awq, tmp_path / "m.gguf", to="gguf")
    first = split_gguf(tmp_path / "m.gguf", tmp_path / "cut", max_tensors=4).paths[0]
    assert code(lambda: verify(awq, first)) == "verify-shards"
    merge_gguf([first], tmp_path / "again.gguf")
    assert verify(awq, tmp_path / "again.gguf").method == "digests"
    edit_gguf(tmp_path / "m.gguf", tmp_path / "e.gguf", assignments=[parse_assignment("general.name=Other")])
    metadata = open_gguf(tmp_path / "e.gguf").metadata
    assert "qformats.digests" not in metadata and "qformats.provenance" in metadata
    report = convert(tmp_path / "e.gguf", tmp_path / "back", to="awq")
    assert report.lossless


def test_a_conversion_sets_keys_and_verifies_by_replay(tmp_path: Path) -> None:
    source = model(tmp_path / "m.gguf", metadata={"a": Value("u8", 1)})
    convert(source, tmp_path / "c.gguf", to="gguf", metadata=["a=2", "b:[str]=[\"x\"]"])
    metadata = open_gguf(tmp_path / "c.gguf").metadata
    assert (metadata["a"], metadata["b"].type, list(metadata["b"].value)) == (Value("u8", 2), "[str]", ["x"])
    assert verify(source, tmp_path / "c.gguf", replay=True).ok
    assert code(lambda: convert(source, tmp_path / "x.gguf", to="gguf", metadata=["a=300"])) == "metadata-value"
    awq = FIXTURES / "awq" / "gemm-g32"
    assert code(lambda: convert(awq, tmp_path / "x", to="gptq", metadata=["a=1"])) == "metadata-target"


# ---------------------------------------------------------------- command line


def run(*words: object) -> Result:
    return CliRunner().invoke(qconvert, [str(word) for word in words], prog_name="qconvert")


def test_the_commands_do_the_same(tmp_path: Path) -> None:
    source = model(tmp_path / "m.gguf")
    found = run("split", source, tmp_path / "m", "--max-size", "0.5K")
    assert found.exit_code == 2
    found = run("split", source, tmp_path / "m", "--max-size", "1K", "--json")
    assert found.exit_code == 0 and len(json.loads(found.stdout)["files"]) == 1
    found = run("split", source, tmp_path / "m", "--max-tensors", 2)
    assert found.exit_code == 0 and "3 files" in found.stdout and "m-00003-of-00003.gguf" in found.stdout
    plan = run("plan", source, "--to", "gguf", "--set-metadata", "general.name=Tiny", "--json")
    (tmp_path / "plan.json").write_text(plan.stdout)
    assert run("convert", source, tmp_path / "p.gguf", "--plan", tmp_path / "plan.json").exit_code == 0
    assert open_gguf(tmp_path / "p.gguf").metadata["general.name"] == Value("str", "Tiny")
    assert run("merge", tmp_path / "m-00001-of-00003.gguf", tmp_path / "one.gguf").exit_code == 0
    assert (tmp_path / "one.gguf").read_bytes() == source.read_bytes()
    words = ("--set-metadata", "general.name=Tiny", "--rename-metadata", "general.name=x", "--rename-tensor", "t0=t9")
    assert run("edit", source, tmp_path / "e.gguf", *words).exit_code == 2
    assert run("edit", source, tmp_path / "e.gguf", *words[:2], *words[4:]).exit_code == 0
    assert open_gguf(tmp_path / "e.gguf").metadata["general.name"] == Value("str", "Tiny")
    assert np.all(np.frombuffer(open_gguf(tmp_path / "e.gguf").tensors["t9"].read(), "u1") == 1)

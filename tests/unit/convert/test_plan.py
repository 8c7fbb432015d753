"""Plans: what is read at which depth, the one default rule, consent, and that a plan is stable data."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder import Llama
from checkpoints import DENSE, PACKED, Tensors, array, converted, edit, edit_json, load, names_in, options, planned, put, ready
from reference import gguf_tensors

from converters.plan import Plan, make_plan, refuse_losses
from converters.verify import verify
from qformats.containers.gguf import open_gguf
from qformats.containers.source import FileSource
from qformats.errors import UsageError, WouldLose
from qformats.reencode import KINDS

SYM, ASYM, ACT, MIXED = "gptq/4b-g32-sym", "gptq/4b-g32-asym-v1", "gptq/4b-g32-act", "gptq/dynamic-mixed"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """Every read of a file as (file name, start, stop)."""
    seen: list[tuple[str, int, int]] = []
    real = FileSource.pread_into

    def pread_into(self: FileSource, offset: int, buffer: memoryview) -> None:
        seen.append((Path(self.name).name, offset, offset + buffer.nbytes))
        real(self, offset, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "pread_into", pread_into)
        yield seen


def leaves_read(plan: Plan, seen: list[tuple[str, int, int]]) -> set[str]:
    """Leaf names of the tensors whose bytes were touched."""
    touched = set()
    for raw in plan.checkpoint.raw.values():
        low, high = raw.offset, raw.offset + raw.nbytes
        if any(name == "model.safetensors" and start < high and low < stop for name, start, stop in seen):
            touched.add(raw.name.rpartition(".")[2])
    return touched


def by_name(plan: Plan) -> dict[str, Any]:
    return {job.name: job for job in plan.jobs}


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("path", [SYM, ASYM, "awq/gemm-g32", "dense/llama", "gptq/moe-qwen3"])
def test_a_header_plan_reads_no_tensor(path: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(monkeypatch) as seen:
        plan = planned(ready(path, work), "gguf", header_only=True)
    with plan.checkpoint:
        assert leaves_read(plan, seen) == set() and not plan.scanned
        assert plan.to_json()["depth"] == "header"


def codes_read(plan: Plan, seen: list[tuple[str, int, int]]) -> float:
    """Share of the bytes of all codes that was read, counted once."""
    touched = total = 0
    for raw in plan.checkpoint.raw.values():
        if raw.name.endswith(".qweight"):
            total += raw.nbytes
            pieces = sorted((max(a, raw.offset), min(b, raw.offset + raw.nbytes)) for name, a, b in seen if name == "model.safetensors")
            at = raw.offset
            for start, stop in pieces:
                touched += max(0, stop - max(start, at))
                at = max(at, stop)
    return touched / total


def wide_model(directory: Path, zero: int | str) -> Path:
    """Tensors of a few thousand rows, so that a probe of some rows is a small share."""
    return Llama(hidden=64, inner=8192, heads=4, kv=2, head_dim=32, zero=zero).write(directory / "wide")


@pytest.mark.parametrize(("zero", "to"), [(8, "gguf"), ("mixed", "gguf:q8_0")])
def test_a_scan_reads_parameters_and_few_codes(zero: int | str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(monkeypatch) as seen:
        plan = planned(wide_model(tmp_path, zero), to)
    with plan.checkpoint:
        assert {"qzeros", "scales"} <= leaves_read(plan, seen) and plan.scanned
        assert codes_read(plan, seen) < 0.1


def test_a_scan_reads_codes_where_a_rule_asks(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(monkeypatch) as seen:
        plan = planned(ready(ASYM, work), "gguf:q4_1")
    with plan.checkpoint:
        assert codes_read(plan, seen) > 0.9  # flips and shifts depend on the codes' range


@pytest.mark.parametrize("path", PACKED)
def test_a_claim_is_never_better_than_the_scan(path: str, work: Path) -> None:
    source = ready(path, work)
    claim, scan = planned(source, "gguf", header_only=True), planned(source, "gguf")
    with claim.checkpoint, scan.checkpoint:
        found = by_name(scan)
        for job in claim.jobs:
            assert KINDS.index(found[job.name].kind) <= KINDS.index(job.kind), job.name
            assert scan.output.parts[job.name].nbytes <= claim.output.parts[job.name].nbytes


# ---------------------------------------------------------------- the default rule


def test_asymmetric_int4_becomes_the_smallest_exact_type_and_the_saving_is_named(work: Path) -> None:
    plan = planned(ready(ASYM, work), "gguf")
    with plan.checkpoint:
        for job in plan.jobs:
            if job.action == "codes":
                assert (job.kind, job.type) == ("exact", "Q5_0")
                saved = job.weights // 32 * (22 - 20)
                assert any(f"q4_1 would save {saved} bytes" in note and "2^-11" in note for note in job.notes), job.notes


@pytest.mark.parametrize(
    ("zero", "high", "expected"),
    [(8, 15, "Q4_0"), (7, 15, "Q4_0"), (6, 13, "Q4_0"), (0, 15, "Q4_1"), (4, 15, "Q4_1"), (6, 15, "Q4_1"), (3, 15, "Q4_1")],
)
def test_each_tensor_gets_its_own_smallest_exact_type(zero: int, high: int, expected: str, tmp_path: Path) -> None:
    model = Llama(zero="mixed")  # scales are powers of two: every offset is a half
    codes = np.random.default_rng(4).integers(0, high + 1, model.shape("up_proj"))
    codes[:, ::32], codes[:, 1::32] = 0, high
    model.codes["up_proj"] = codes
    model.zeros["up_proj"] = np.full((128, 2), zero)
    plan = planned(model.write(tmp_path / "source"), "gguf")
    with plan.checkpoint:
        job = by_name(plan)["blk.0.ffn_up.weight"]
        assert (job.kind, job.type) == ("exact", expected)


@pytest.mark.parametrize(("group", "expected"), [(256, "Q4_K"), (-1, "Q4_K"), (128, "Q5_0")])
def test_one_group_over_256_columns_becomes_q4_k(group: int, expected: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    model = Llama(hidden=256, inner=512, heads=4, kv=2, head_dim=64, group=group, zero="mixed")
    for leaf in ("up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"):
        n, k = model.shape(leaf)
        groups = 1 if group == -1 else k // group
        model.scales[leaf] = rng.integers(1025, 2047, (n, groups)) * 2.0**-14 + 2.0**-15  # every offset needs more than 11 bits
        model.scales[leaf] = model.scales[leaf].astype(np.float16).astype(np.float64)
    source = model.write(tmp_path / "source")
    plan = converted(source, tmp_path / "out.gguf", "gguf", exact=True)
    assert {job.type for job in plan.jobs if job.action == "codes"} == {expected}
    found = gguf_tensors(tmp_path / "out.gguf")
    for leaf, name in (("up_proj", "ffn_up"), ("down_proj", "ffn_down"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
        kind, values = found[f"blk.0.{name}.weight"]
        assert kind == expected and np.array_equal(values, model.weight(leaf))
    converted(tmp_path / "out.gguf", tmp_path / "back", "gptq", exact=True)
    assert load(tmp_path / "back" / "model.safetensors") == load(source / "model.safetensors")


@pytest.mark.parametrize("path", DENSE)
def test_floats_stay_as_they_are(path: str, work: Path) -> None:
    plan = planned(ready(path, work), "gguf", exact=True)
    with plan.checkpoint:
        refuse_losses(plan)
        assert {job.kind for job in plan.jobs} <= {"copied", "exact"}


@pytest.mark.parametrize(("more", "head", "embedding"), [
    ({}, "Q8_0", "Q4_0"), ({"pure": True}, "Q4_0", "Q4_0"), ({"output_tensor_type": "q5_1"}, "Q5_1", "Q4_0"),
    ({"token_embedding_type": "q5_0"}, "Q8_0", "Q5_0"), ({"tensor_types": (("OUTPUT.w", "q4_1"),)}, "Q4_1", "Q4_0"),
])  # fmt: skip
def test_a_named_type_of_a_dense_model_is_a_file_type(more: dict[str, Any], head: str, embedding: str, work: Path) -> None:
    plan = planned(ready("dense/llama", work), "gguf:q4_0", **more)
    with plan.checkpoint:
        refuse_losses(plan)
        types = {job.name: job.type for job in plan.jobs}
        assert types["blk.0.ffn_up.weight"] == "Q4_0" and types["output_norm.weight"] == "F32"
        assert (types["output.weight"], types["token_embd.weight"]) == (head, embedding)


@pytest.mark.parametrize("to", ["awq", "compressed-tensors:int8"])
def test_a_group_that_divides_every_width_is_chosen_where_none_is_named(to: str, tmp_path: Path) -> None:
    """Rows of 192 weights: groups of 128 would leave them as floats."""
    source = Path(shutil.copytree(ready("dense/llama", tmp_path), tmp_path / "source"))
    edit_json(source / "config.json", lambda config: config.update(intermediate_size=192))
    edit(source, lambda tensors: [_widen(tensors, name) for name in list(tensors) if ".mlp." in name])
    plan = converted(source, tmp_path / "out", to, allow_requantize=True)
    made = [job for job in plan.jobs if job.map.kind == "linear" and job.map.leaf == "weight"]
    assert {(job.kind, job.storage.group) for job in made if job.storage} == {("requantized", 64), ("requantized", None)}
    assert all(job.storage and "groups of 64" in job.reason for job in made) and verify(source, tmp_path / "out").ok
    named = planned(source, f"{to},group=128", allow_requantize=True)
    named.checkpoint.close()
    wide = [job for job in named.jobs if job.map.leaf == "weight" and job.map.shape[-1] == 192]
    assert wide and all(job.kind == "copied" and "does not divide" in job.reason for job in wide)


def _widen(tensors: Tensors, name: str) -> None:
    values = array(tensors, name)
    put(tensors, name, np.resize(values, [192 if size == 128 else size for size in values.shape]))


def test_a_file_type_on_codes_needs_consent(work: Path) -> None:
    plan = planned(ready(ASYM, work), "gguf:q3_k_s")  # rows of 64 and 128 weights: Q4_0, which cannot hold free zero points
    with plan.checkpoint, pytest.raises(WouldLose) as caught:
        refuse_losses(plan)
    assert caught.value.code == "requantize"
    plan = planned(ready(ASYM, work), "gguf:q3_k_s", allow_requantize=True)
    with plan.checkpoint:
        refuse_losses(plan)
        jobs = by_name(plan)
        assert jobs["blk.0.ffn_up.weight"].type == "Q4_0" and jobs["token_embd.weight"].kind == "requantized"
        assert plan.output is not None and jobs["blk.0.attn_norm.weight"].type == "F32"


def test_a_block_type_on_codes_is_no_file_type(work: Path) -> None:
    for more, embedding in (({}, "F16"), ({"pure": True}, "Q4_1"), ({"token_embedding_type": "Q5_1"}, "Q5_1")):
        plan = planned(ready(ASYM, work), "gguf:q4_1", **more)  # type: ignore[arg-type]
        with plan.checkpoint:
            jobs = by_name(plan)
            assert jobs["blk.0.ffn_up.weight"].action == "codes" and jobs["token_embd.weight"].type == embedding, more


@pytest.mark.parametrize(("to", "more", "code"), [
    ("gptq", {"pure": True}, "mix-options"), ("hf", {"output_tensor_type": "q8_0"}, "mix-options"),
    ("gguf", {"pure": True}, "target-type-missing"),
    ("gguf:q4_0", {"output_tensor_type": "q4_k_m"}, "target-type"), ("gguf:q4_0", {"token_embedding_type": "q9"}, "target-type"),
    ("gguf:q4_0", {"tensor_types": (("attn", "q3_k_l"),)}, "target-type"),
])  # fmt: skip
def test_bad_options_of_file_types(to: str, more: dict[str, Any], code: str, work: Path) -> None:
    with pytest.raises(UsageError) as caught:
        planned(ready("dense/llama", work), to, **more)
    assert caught.value.code == code


def test_options_that_came_later_stand_in_records_only_when_used() -> None:
    assert options("gguf:q4_0").to_json().keys() == {"to", "exact", "allow_requantize", "tensor_types", "pre_tokenizer"}
    used = options("gguf:q4_0", pure=True, output_tensor_type="q6_k").to_json()
    assert used["pure"] is True and used["output_tensor_type"] == "q6_k" and "token_embedding_type" not in used


def test_a_file_with_options_of_file_types_is_replayed(work: Path, tmp_path: Path) -> None:
    source = ready("dense/llama", work)
    converted(source, tmp_path / "out.gguf", "gguf:q4_1", pure=True, token_embedding_type="q5_0")
    assert verify(source, tmp_path / "out.gguf", replay=True).ok
    types = {name: raw.dtype for name, raw in open_gguf(tmp_path / "out.gguf").tensors.items()}
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q4_1", "Q5_0")


def test_requantizing_a_gguf_copies_what_has_its_type(work: Path, tmp_path: Path) -> None:
    converted(ready("dense/llama", work), tmp_path / "first.gguf", "gguf:q5_0")
    plan = converted(tmp_path / "first.gguf", tmp_path / "second.gguf", "gguf:q4_1")
    jobs = by_name(plan)
    assert jobs["output.weight"].kind == "copied" and jobs["blk.0.ffn_up.weight"].kind == "requantized"
    before, after = (dict(open_gguf(tmp_path / name).metadata) for name in ("first.gguf", "second.gguf"))
    assert (before.pop("general.file_type").value, after.pop("general.file_type").value) == (8, 3)
    ours = {key for key in before if key.startswith("qformats.")}
    assert all(before[key] == after[key] for key in before.keys() - ours) and before.keys() == after.keys()


# ---------------------------------------------------------------- consent


def test_exact_raises_with_the_table_of_offenders(work: Path, tmp_path: Path) -> None:
    with pytest.raises(WouldLose) as caught:
        converted(ready(ASYM, work), tmp_path / "out.gguf", "gguf:q4_1", exact=True)
    plan = planned(ready(ASYM, work), "gguf:q4_1")
    with plan.checkpoint:
        offenders = [job.name for job in plan.jobs if job.kind == "codes-exact"]
    assert caught.value.code == "not-exact" and caught.value.exit_code == 7
    assert offenders and all(name in str(caught.value) for name in offenders) and "codes-exact" in str(caught.value)
    assert f"{len(offenders)} tensors" in str(caught.value)
    assert names_in(tmp_path) == []


def test_a_named_type_is_consent_to_rounded_offsets(work: Path, tmp_path: Path) -> None:
    plan = converted(ready(ASYM, work), tmp_path / "out.gguf", "gguf:q4_1")
    assert {job.kind for job in plan.jobs if job.action == "codes"} == {"codes-exact"}
    reasons = [job.reason for job in plan.jobs if job.kind == "codes-exact"]
    assert all("2^-11" in reason and "2^-25" in reason for reason in reasons)


def test_new_codes_need_consent(work: Path, tmp_path: Path) -> None:
    source = ready(ACT, work)
    with pytest.raises(WouldLose) as caught:
        converted(source, tmp_path / "out.gguf", "gguf")
    assert caught.value.code == "requantize" and "--allow-requantize" in str(caught.value) and names_in(tmp_path) == []
    plan = converted(source, tmp_path / "a.gguf", "gguf", allow_requantize=True)
    assert plan.kinds["requantized"] == 6
    plan = converted(source, tmp_path / "b.gguf", "gguf:q8_0")
    assert plan.kinds["requantized"] == 6
    plan = converted(source, tmp_path / "c.gguf", "gguf", tensor_types=(("attn_[qkv]|ffn_(gate|up|down)|attn_output", "f16"),))
    assert "requantized" not in plan.kinds


def test_exact_beats_a_named_type(work: Path, tmp_path: Path) -> None:
    with pytest.raises(WouldLose):
        converted(ready(ACT, work), tmp_path / "out.gguf", "gguf:q8_0", exact=True)
    converted(ready(SYM, work), tmp_path / "out.gguf", "gguf:q8_0", exact=True)


# ---------------------------------------------------------------- tensor types


def test_the_first_matching_tensor_type_wins(work: Path, tmp_path: Path) -> None:
    types = ((r"attn_v", "q8_0"), (r"blk\.0\.attn_", "q5_0"), (r"token_embd", "f32"))
    plan = converted(ready(SYM, work), tmp_path / "out.gguf", "gguf", tensor_types=types)
    found = {job.name: job.type for job in plan.jobs}
    assert found["blk.0.attn_v.weight"] == "Q8_0" and found["blk.0.attn_q.weight"] == "Q5_0"
    assert found["blk.0.ffn_up.weight"] == "Q4_0" and found["token_embd.weight"] == "F32"
    assert {name: kind for name, (kind, _) in gguf_tensors(tmp_path / "out.gguf").items()} == found


@pytest.mark.parametrize("types", [(("attn_v", "q9_9"),), (("attn_(", "q8_0"),)])
def test_a_wrong_tensor_type_is_a_usage_error(types: tuple[tuple[str, str], ...], work: Path) -> None:
    with pytest.raises(UsageError):
        planned(ready(SYM, work), "gguf", tensor_types=types)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("path", [SYM, ASYM, MIXED, "gptq/moe-qwen3", "awq/gemv-g64", "dense/gemma3"])
@pytest.mark.parametrize("to", ["gguf", "gguf:q8_0", "hf"])
def test_a_plan_is_stable_json(path: str, to: str, work: Path) -> None:
    texts = set()
    for _ in range(2):
        plan = planned(ready(path, work), to)
        with plan.checkpoint:
            texts.add(json.dumps(plan.to_json(), allow_nan=False))
    assert len(texts) == 1
    data = json.loads(texts.pop())
    assert data["kinds"] and sum(data["kinds"].values()) == len(data["tensors"])
    for tensor in data["tensors"]:
        assert tensor["kind"] in KINDS and tensor["reason"] and tensor["nbytes"] == sum(p["nbytes"] for p in tensor["parts"].values())


@pytest.mark.parametrize("to", ["gguf", "hf", "gptq", "awq"])
def test_parts_do_not_overlap_and_the_file_is_as_long_as_planned(to: str, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = converted(ready(MIXED if to != "awq" else SYM, work), out, to, allow_requantize=True)
    spans = sorted((p.offset, p.offset + p.nbytes) for p in plan.output.parts.values())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    size = sum(f.stat().st_size for f in out.iterdir()) if out.is_dir() else out.stat().st_size
    assert plan.output.nbytes == size == plan.to_json()["nbytes"]


def test_what_has_no_place_is_dropped_by_name(work: Path, tmp_path: Path) -> None:
    import shutil

    source = Path(shutil.copytree(ready(SYM, work), tmp_path / "source"))
    edit(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", [8], bytes(32))}))
    plan = planned(source, "gguf")
    with plan.checkpoint:
        assert list(plan.dropped) == ["model.layers.0.self_attn.rotary_emb.inv_freq"] and all(plan.dropped.values())


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gptq/mislabelled-v2-as-v1", "stored as they are"),
        ("gptq/disagreeing-configs", "group_size"),
        ("gptq/4b-g32-z0-per-field", "read as 16"),
        ("gptq/autogptq-4b-g32-z0", "read as 16"),
    ],
)
def test_a_doubtful_file_is_warned_about(path: str, words: str, work: Path) -> None:
    plan = planned(ready(path, work), "gguf")
    with plan.checkpoint:
        assert [w for w in plan.warnings if words in w], plan.warnings


@pytest.mark.parametrize("path", [SYM, ASYM, MIXED, "awq/gemm-g32", "awq/gemm-g32-sym-absent-zeros", "dense/qwen2"])
def test_a_plain_file_is_not(path: str, work: Path) -> None:
    plan = planned(ready(path, work), "gguf")
    with plan.checkpoint:
        assert plan.warnings == ()


def test_a_plan_takes_an_open_checkpoint(work: Path) -> None:
    from qformats.checkpoint import open_checkpoint

    with open_checkpoint(ready(SYM, work)) as checkpoint:
        assert make_plan(checkpoint, options("gguf")).checkpoint is checkpoint


def test_bf16_scales_too_small_for_halves_are_said_so(tmp_path: Path) -> None:
    source = Llama().write(tmp_path / "source")
    name = f"{Llama.name('up_proj')}.scales"

    def change(tensors: Any) -> None:
        halves = array(tensors, name).astype(np.float32)
        halves[0, 0] = np.float32(2.0**-18 * 1.0078125)
        tensors[name] = ("BF16", tensors[name][1], b"")
        put(tensors, name, (halves.view("<u4") >> 16).astype("<u2"))

    edit(source, change)
    plan = planned(source, "gguf")
    with plan.checkpoint:
        job = by_name(plan)["blk.0.ffn_up.weight"]
        assert job.kind == "codes-exact" and job.reason.startswith("1 of ") and "float16" in job.reason
        refuse_losses(plan)
    with pytest.raises(WouldLose):
        converted(source, tmp_path / "out.gguf", "gguf", exact=True)


def test_the_header_does_not_promise_that_float_zero_points_keep_every_bit() -> None:
    """HQQ's fractions moved by 8 need more bits than float16 has: neither claimed from the header nor proved by the scheme alone."""
    from converters.claims import pessimist
    from qformats import registry
    from qformats.checkpoint import open_checkpoint
    from qformats.formats.protocol import Target
    from qformats.reencode import fit
    from qformats.rewrite import Refused

    with open_checkpoint(Path(__file__).parents[3] / "fixtures" / "hqq" / "4b-g32-ax1-f16") as checkpoint:
        scheme = checkpoint.scheme("model.layers.0.self_attn.q_proj")
    offered = registry.format_module("torchao").storages(Target("torchao", None, {}), scheme)
    storage = next(one for one in offered if one.zero_dtype == "float16")
    row = pessimist(scheme, ordered=False)
    with pytest.raises(Refused):
        fit(row, storage)
    assert fit(row, storage, rounding=True).kind == "codes-exact"


def test_counts_in_a_reason_are_of_all_rows_or_say_of_how_many(work: Path) -> None:
    """A probe of 64 rows decides the kind at times; what it counts is then not called a count of the tensor."""
    seen = 0
    for job in planned(ready("gptq/4b-g32-asym-v1", work), "gguf:q4_1").jobs:
        for found in re.finditer(r"\b\d+ of (\d+) (?:blocks|scales|offsets|groups)\b", job.reason):
            rows, columns = job.map.shape
            each, said = columns // 32, re.search(r"counted in (\d+) of (\d+) rows", job.reason)
            assert int(found[1]) == each * (rows if said is None else int(said[1]))
            assert said is None or int(said[2]) == rows
            seen += 1
    assert seen

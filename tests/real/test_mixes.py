"""File types against llama.cpp: its dry run names the type of every tensor, and whole files are the same bytes."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workshop
from test_dense import tiny_model

from converters.execute import execute
from converters.mapping import map_tensors
from converters.mixing import mix_of
from converters.options import PlanOptions
from converters.plan import make_plan, refuse_losses
from qformats import registry
from qformats.checkpoint import open_checkpoint
from qformats.errors import Unsupported
from qformats.formats.ggml.mixes import FILE_TYPES, Model, Wish, choose, requires_imatrix
from qformats.quantize.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix

MATRIX = {"x": np.ones(4, np.float32)}  # an importance matrix that speaks of no tensor: only that there is one decides types
# architecture, layers, heads, key-value heads, experts: every branch of the rules
MODELS = [
    ("llama", 17, 8, 2, 0), ("llama", 17, 8, 8, 0), ("llama", 17, 8, 2, 8), ("llama", 6, 8, 4, 4), ("llama", 80, 8, 2, 0),
    ("qwen2", 80, 8, 8, 0), ("falcon", 33, 8, 1, 0), ("gpt2", 12, 8, 8, 0),
]  # fmt: skip
Types = dict[str, str]


def write_model(path: Path, arch: str, layers: int, heads: int, heads_kv: int, experts: int, k: int, tied: bool) -> Path:
    """A model of zeros with two rows a matrix: enough for all that llama.cpp's choice looks at."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(k)
    writer.add_feed_forward_length(k)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    attention = ["attn_qkv"] if arch in ("falcon", "gpt2") else ["attn_q", "attn_k", "attn_v"]
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (3, k), "position_embd": (3, k), **({} if tied else {"output": (3, k)})}
    for layer in range(layers):
        shapes.update({f"blk.{layer}.{name}": (2, k) for name in (*attention, "attn_output")})
        names = ("ffn_up", "ffn_gate", "ffn_down")
        shapes.update({f"blk.{layer}.{name}{'_exps' if experts else ''}": (experts, 2, k) if experts else (2, k) for name in names})
        shapes.update({f"blk.{layer}.ffn_gate_inp": (8, k), f"blk.{layer}.attn_norm": (k,)})
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def content(path: Path) -> tuple[Model, dict[str, tuple[int, ...]], Types]:
    """What rules look at, and the types there are."""
    with open_checkpoint(path) as found:
        model = Model.of({key: value.value for key, value in found.metadata.items()})
        return model, {name: raw.shape for name, raw in found.raw.items()}, {name: raw.dtype for name, raw in found.raw.items()}


def file_types(k: int) -> list[str]:
    """All that llama.cpp makes of rows of ``k``; it gives up on Q1_0 where rows are no whole blocks."""
    return [name for name in FILE_TYPES if name != "q1_0" or not k % 128]


@pytest.mark.real
@pytest.mark.parametrize("case", MODELS, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize(("k", "tied"), [(256, True), (96, False), (100, True)])
def test_rules_are_llama_cpps(case: tuple[str, int, int, int, int], k: int, tied: bool, tmp_path: Path, llama: Any) -> None:
    path = write_model(tmp_path / "model.gguf", *case, k, tied)
    model, shapes, stored = content(path)
    for name, with_imatrix in product(file_types(k), (False, True)):
        mine = choose(Wish(FILE_TYPES[name], with_imatrix=with_imatrix), model, shapes)
        theirs = llama.chosen_types(path, name.upper(), imatrix=MATRIX if with_imatrix else None)
        assert {tensor: mine.get(tensor, stored[tensor]).upper() for tensor in stored} == theirs, (name, with_imatrix)


@pytest.mark.real
@pytest.mark.parametrize("options", [
    {"pure": True}, {"output_type": "q5_0"}, {"embedding_type": "q4_1"}, {"output_type": "q8_0", "embedding_type": "iq4_nl"},
    {"tensor_types": [("attn_v", "q8_0"), (r"blk\.[0-3]\.ffn_(up|down)", "q3_k"), ("token_embd", "q2_k"), ("^output", "q4_0")]},
    {"tensor_types": [("ffn_down", "q6_k")], "output_type": "bf16"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_overrides_are_llama_cpps(options: dict[str, Any], tied: bool, tmp_path: Path, llama: Any) -> None:
    path = write_model(tmp_path / "model.gguf", "llama", 17, 8, 2, 0, 256, tied)
    model, shapes, stored = content(path)
    upper = {key: value.upper() if isinstance(value, str) else value for key, value in options.items()}
    upper["tensor_types"] = [(pattern, kind.upper()) for pattern, kind in options.get("tensor_types", [])]
    for name in FILE_TYPES:
        mine = choose(Wish(FILE_TYPES[name], **options), model, shapes)
        theirs = llama.chosen_types(path, name.upper(), **upper)
        assert {tensor: mine.get(tensor, stored[tensor]).upper() for tensor in stored} == theirs, name


@pytest.mark.real
def test_llama_cpp_demands_a_matrix_where_rules_say_so(tmp_path: Path, llama: Any) -> None:
    path = write_model(tmp_path / "model.gguf", "llama", 2, 8, 2, 0, 256, True)
    model, shapes, _ = content(path)
    for name, kind in FILE_TYPES.items():
        needy = any(requires_imatrix(tensor, block, kind) for tensor, block in choose(Wish(kind), model, shapes).items())
        if needy:
            with pytest.raises(RuntimeError):
                llama.quantize_file(path, tmp_path / "out.gguf", name.upper())
        else:
            llama.quantize_file(path, tmp_path / "out.gguf", name.upper())


# ---------------------------------------------------------------- real and random models


def planned_types(source: Path, name: str) -> Types:
    """By the rules alone, so that types without a quantizer are seen too; float types where no rule speaks are the stored ones."""
    options = PlanOptions(registry.parse_target(f"gguf:{name}"))
    with open_checkpoint(source) as checkpoint:
        return {key: kind.upper() for key, kind in mix_of(checkpoint, options, map_tensors(checkpoint, "gguf").tensors).types.items()}


def assert_types(folder: Path, workshop: Workshop, llama: Any) -> None:
    """The plan of the directory and that of its float16 GGUF have llama.cpp's types for that GGUF, for every file type."""
    file, _ = workshop.convert(folder, "gguf:f16")
    _, shapes, stored = content(file)
    for name in file_types(min(shape[-1] for shape in shapes.values() if len(shape) > 1)):
        theirs = llama.chosen_types(file, name.upper())
        for source in (folder, file):
            assert {**stored, **planned_types(source, name)} == theirs, (name, source)


def assert_plans(source: Path, file: Path, llama: Any, names: list[str]) -> None:
    """Whole plans, down to the float types of what no rule changes."""
    for name in names:
        theirs = llama.chosen_types(file, name.upper())
        plan = make_plan(source, PlanOptions(registry.parse_target(f"gguf:{name}")))
        with plan.checkpoint:
            assert {job.name: job.type for job in plan.jobs} == theirs, name


@pytest.mark.real
@pytest.mark.parametrize(("name", "stage"), [("smollm2-135m", "smollm"), ("smollm2-768", "smollm"), ("gemma3-270m", "gemma")])
def test_types_of_real_models(name: str, stage: str, lab_model: Any, workshop: Workshop, llama: Any) -> None:
    assert_types(lab_model(name, stage), workshop, llama)


@pytest.mark.real
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "qwen2_moe", "gemma3", "falcon-new", "gpt2", "phi3", "gpt_neox"])
def test_types_of_every_kind_of_model(name: str, tmp_path: Path, workshop: Workshop, llama: Any) -> None:
    folder = tiny_model(name, tmp_path / name)
    assert_types(folder, workshop, llama)
    file, _ = workshop.convert(folder, "gguf:f16")
    for source in (folder, file):
        assert_plans(source, file, llama, ["q4_0", "q5_1", "q8_0", "q4_k_m", "q3_k_l", "q6_k"])


# ---------------------------------------------------------------- whole files


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 256 columns and more as float16 GGUF."""
    from converters import convert

    folder = tmp_path_factory.mktemp("wide")
    tiny_model("llama-wide", folder / "model")
    convert(folder / "model", folder / "f16.gguf", to="gguf:f16")
    return folder / "f16.gguf"


def made(source: Path, out: Path, name: str, **options: Any) -> Path:
    plan = make_plan(source, PlanOptions(registry.parse_target(f"gguf:{name}"), allow_requantize=True, **options))
    with plan.checkpoint:
        refuse_losses(plan)
        execute(plan, out, workers=1)
    return out


def everything(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, bytes]]]:
    with open_checkpoint(path) as found:
        metadata = {k: (v.type, list(v.value) if v.type.startswith("[") else v.value) for k, v in found.metadata.items()}
        tensors = {name: (raw.dtype, bytes(raw.read())) for name, raw in found.raw.items()}
    return {key: value for key, value in metadata.items() if not key.startswith("qformats.")}, tensors


def importances(source: Path, out: Path) -> tuple[ImportanceMatrix, dict[str, np.ndarray[Any, Any]]]:
    """Random importances of every matrix, for us and for llama.cpp."""
    rng = np.random.default_rng(4)
    shapes = content(source)[1]
    rows = {name: np.exp(rng.normal(0, 1, shape[-1])).astype(np.float32) for name, shape in shapes.items() if len(shape) == 2}
    write_imatrix(ImportanceMatrix({name: Entry(row.reshape(1, -1), np.array([1])) for name, row in rows.items()}, (), 1, 512), out)
    return read_imatrix(out), rows


def assert_same_file(source: Path, name: str, llama: Any, tmp_path: Path, weighted: bool) -> str:
    """Our file of a file type is llama.cpp's, tensor by tensor and key by key."""
    matrix, rows = importances(source, tmp_path / "imatrix.gguf") if weighted else (None, None)
    llama.quantize_file(source, tmp_path / "theirs.gguf", name.upper(), threads=2, imatrix=rows)
    mine, (keys, theirs) = everything(made(source, tmp_path / "ours.gguf", name, imatrix=matrix)), everything(tmp_path / "theirs.gguf")
    assert {key: value for key, value in mine[0].items() if not key.startswith("quantize.imatrix.")} == keys
    assert {tensor: kind for tensor, (kind, _) in mine[1].items()} == {tensor: kind for tensor, (kind, _) in theirs.items()}
    assert [tensor for tensor in theirs if mine[1][tensor] != theirs[tensor]] == []
    return ", ".join(sorted({kind for kind, _ in theirs.values()}))


NEEDY = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")  # some tensor needs a matrix


@pytest.mark.real
@pytest.mark.parametrize("name", FILE_TYPES)
def test_a_file_is_llama_cpps(name: str, wide: Path, tmp_path: Path, llama: Any) -> None:
    assert_same_file(wide, name, llama, tmp_path, name in NEEDY)


@pytest.mark.real
@pytest.mark.parametrize("name", ["q4_0", "q5_1", "q3_k_s", "q4_k_m", "q6_k", "iq4_nl", "iq4_xs", "iq3_m", "tq2_0"])
def test_a_file_with_a_matrix_is_llama_cpps(name: str, wide: Path, tmp_path: Path, llama: Any) -> None:
    assert_same_file(wide, name, llama, tmp_path, True)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.real if name in ("q4_k_m", "iq4_xs", "iq2_xs") else pytest.mark.real_full) for name in FILE_TYPES
])  # fmt: skip
def test_a_real_models_file_is_llama_cpps(
    name: str, lab_model: Any, workshop: Workshop, tmp_path: Path, llama: Any, figure: Any
) -> None:
    """Bytes, and with them the mean NLL: that of two files of the same tensors is the same."""
    source, _ = workshop.convert(lab_model("smollm2-768-slice4", "wide"), "gguf:f16")
    figure(f"{name}: every tensor ({assert_same_file(source, name, llama, tmp_path, name in NEEDY)}) has llama.cpp's bytes")


@pytest.mark.real
@pytest.mark.parametrize(("first", "then"), [("Q8_0", "q4_k_m"), ("Q4_K_M", "q8_0"), ("Q5_K_M", "q4_k_s"), ("Q6_K", "f16")])
def test_a_requantized_file_is_llama_cpps(first: str, then: str, wide: Path, tmp_path: Path, llama: Any) -> None:
    llama.quantize_file(wide, tmp_path / "first.gguf", first)
    llama.quantize_file(tmp_path / "first.gguf", tmp_path / "theirs.gguf", then.upper())
    assert everything(made(tmp_path / "first.gguf", tmp_path / "ours.gguf", then)) == everything(tmp_path / "theirs.gguf")


@pytest.mark.real
def test_what_needs_a_matrix_is_refused_before_work_starts(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        made(wide, tmp_path / "out.gguf", "q2_k_s")
    assert caught.value.code == "importance-needed" and "blk.0.attn_q.weight" in caught.value.message
    assert not (tmp_path / "out.gguf").exists()

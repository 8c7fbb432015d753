"""Broken checkpoints through the whole conversion: one error with its code each, nothing written, the source as it was."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensors, array, digest, edit, edit_json, load, names_in, put, ready, store

from converters import convert
from qformats.checkpoint import PROVENANCE_KEY
from qformats.containers.gguf import TensorInfo, Value, layout_gguf, open_gguf
from qformats.errors import BadFile, QFormatError, Unsafe, Unsupported, UsageError, WouldLose

GPTQ, ACT, ASYM, AWQ, DENSE = "gptq/4b-g32-sym", "gptq/4b-g32-act", "gptq/4b-g32-asym-v1", "awq/gemm-g32", "dense/llama"
MOE, GEMV = "gptq/moe-qwen3", "awq/gemv-g32"
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
Change = Callable[[Path], Any]


def tensors(change: Callable[[Tensors], Any]) -> Change:
    return lambda source: edit(source, change)


def config(**values: Any) -> Change:
    """Set keys of config.json; None removes one."""

    def change(settings: dict[str, Any]) -> None:
        for key, value in values.items():
            settings.pop(key, None)
            if value is not None:
                settings[key] = value

    return lambda source: edit_json(source / "config.json", change)


def quantization(**values: Any) -> Change:
    """Set keys of the quantization config, in config.json and in the file beside it."""

    def inner(settings: dict[str, Any]) -> None:
        settings["quantization_config"].update(values)

    def change(source: Path) -> None:
        edit_json(source / "config.json", inner)
        for name in ("quantize_config.json", "quant_config.json"):
            (source / name).unlink(missing_ok=True)

    return change


def both(*changes: Change) -> Change:
    def change(source: Path) -> None:
        for one in changes:
            one(source)

    return change


def drop(*names: str) -> Change:
    return tensors(lambda t: [t.pop(name) for name in names])


def retype(name: str, dtype: str, itemsize: int) -> Change:
    """The same shape in another dtype, all zero."""
    return tensors(lambda t: t.update({name: (dtype, t[name][1], bytes(int(np.prod(t[name][1])) * itemsize))}))


def reshape(name: str, cut: Callable[[Any], Any]) -> Change:
    return tensors(lambda t: put(t, name, cut(array(t, name))))


def truncate(name: str, left: int) -> Change:
    """``left`` bytes stay (a negative number: so many are cut off)."""

    def change(source: Path) -> None:
        file = source / name if source.is_dir() else source
        os.truncate(file, left if left >= 0 else file.stat().st_size + left)

    return change


def write(name: str, data: bytes | str) -> Change:
    return lambda source: (source / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def remove(*names: str) -> Change:
    def change(source: Path) -> None:
        for name in names:
            (source / name).unlink()

    return change


def shards(index: Callable[[dict[str, str]], dict[str, Any]] | None = None, twice: bool = False) -> Change:
    """Split the weights over two files with an index that ``index`` may falsify."""

    def change(source: Path) -> None:
        found = load(source / "model.safetensors")
        names = list(found)
        half = len(names) // 2
        parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half - twice :]}
        (source / "model.safetensors").unlink()
        for file, members in parts.items():
            store(source / file, {name: found[name] for name in members})
        weight_map = {name: file for file, members in reversed(parts.items()) for name in members}
        whole = {"metadata": {}, "weight_map": weight_map}
        (source / "model.safetensors.index.json").write_text(json.dumps(index(weight_map) if index else whole))

    return change


def header(change: Callable[[dict[str, Any]], None]) -> Change:
    """Rewrite the safetensors header without touching the payload."""

    def apply(source: Path) -> None:
        file = source / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        head = json.dumps(entries).encode()
        file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])

    return apply


def head_bytes(prefix: bytes) -> Change:
    def apply(source: Path) -> None:
        file = source / "model.safetensors" if source.is_dir() else source
        file.write_bytes(prefix + file.read_bytes()[len(prefix) :])

    return apply


def patch(at: int, data: bytes) -> Change:
    def apply(source: Path) -> None:
        content = bytearray(source.read_bytes())
        content[at : at + len(data)] = data
        source.write_bytes(bytes(content))

    return apply


def gguf(change: Callable[[dict[str, Value], list[TensorInfo]], Any]) -> Change:
    """Write a GGUF again with other metadata or tensor table; payload bytes follow by size (zeros where it grew)."""

    def apply(source: Path) -> None:
        opened = open_gguf(source)
        metadata = dict(opened.metadata)
        infos = [TensorInfo(t.name, t.dtype, t.shape) for t in opened.tensors.values()]
        payload = {name: t.read() for name, t in opened.tensors.items()}
        change(metadata, infos)
        layout = layout_gguf(metadata, infos)
        data = bytearray(layout.size)
        data[: len(layout.header)] = layout.header
        for info in infos:
            old = payload.get(info.name, b"")[: layout.nbytes[info.name]]
            data[layout.offsets[info.name] : layout.offsets[info.name] + len(old)] = old
        for raw in opened.tensors.values():
            raw.source.close()
        source.write_bytes(bytes(data))

    return apply


def key(name: str, kind: str, value: Any) -> Change:
    return gguf(lambda metadata, infos: metadata.update({name: Value(kind, value)}))


def without_key(name: str) -> Change:
    return gguf(lambda metadata, infos: metadata.pop(name))


def without_tensor(name: str) -> Change:
    return gguf(lambda metadata, infos: infos.remove(next(i for i in infos if i.name == name)))


def tensor_shape(name: str, shape: tuple[int, ...]) -> Change:
    def change(metadata: dict[str, Value], infos: list[TensorInfo]) -> None:
        at = next(i for i, info in enumerate(infos) if info.name == name)
        infos[at] = TensorInfo(name, infos[at].dtype, shape)

    return gguf(change)


def retyped(name: str, dtype: str) -> Change:
    def change(metadata: dict[str, Value], infos: list[TensorInfo]) -> None:
        at = next(i for i, info in enumerate(infos) if info.name == name)
        infos[at] = TensorInfo(name, dtype, infos[at].shape)

    return gguf(change)


def replaced_file(data: bytes) -> Change:
    return lambda source: source.write_bytes(data)


def record(change: Callable[[dict[str, Any]], None]) -> Change:
    """Change the provenance record; its digest then no longer holds."""

    def apply(metadata: dict[str, Value], infos: list[TensorInfo]) -> None:
        found = json.loads(metadata[PROVENANCE_KEY].value)
        change(found)
        metadata[PROVENANCE_KEY] = Value("str", json.dumps(found))

    return gguf(apply)


def negative_index(t: Tensors) -> None:
    index = array(t, f"{Q}.g_idx")
    index[3] = -1
    put(t, f"{Q}.g_idx", index)


def far_index(t: Tensors) -> None:
    index = array(t, f"{Q}.g_idx")
    index[3] = 99
    put(t, f"{Q}.g_idx", index)


def not_finite(name: str, value: float) -> Change:
    def change(t: Tensors) -> None:
        values = array(t, name)
        values.reshape(-1)[5] = value
        put(t, name, values)

    return tensors(change)


def other_layer(t: Tensors) -> None:
    """Layer 1 of two is called layer 7."""
    for name in [n for n in t if ".layers.0." in n]:
        t[name.replace(".layers.0.", ".layers.7.")] = t.pop(name)


def only_file(name: str, data: bytes) -> Change:
    """Nothing but config.json and one other file is left."""

    def change(source: Path) -> None:
        (source / "model.safetensors").unlink()
        (source / name).write_bytes(data)

    return change


def emptied(source: Path) -> None:
    shutil.rmtree(source)
    source.mkdir()


def replaced_by_text(source: Path) -> None:
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100000\n")


def lying_offsets(entries: dict[str, Any]) -> None:
    entries[f"{Q}.scales"]["data_offsets"][1] += 1 << 40


def lying_shape(entries: dict[str, Any]) -> None:
    entries[f"{Q}.scales"]["shape"] = [1 << 40, 64]


def unknown_dtype(entries: dict[str, Any]) -> None:
    entries[f"{Q}.scales"]["dtype"] = "F12"


def overlapping(entries: dict[str, Any]) -> None:
    entries[f"{Q}.scales"]["data_offsets"] = list(entries[f"{Q}.qzeros"]["data_offsets"])


PICKLE = b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94."

# name, base fixture, change, target, class, code
CASES: list[tuple[str, str, Change, str, type[QFormatError], str]] = [
    # files
    ("empty directory", GPTQ, emptied, "gguf", BadFile, "no-weights"),
    ("weights are an empty file", GPTQ, truncate("model.safetensors", 0), "gguf", BadFile, "truncated"),
    ("weights of seven bytes", GPTQ, truncate("model.safetensors", 7), "gguf", BadFile, "truncated"),
    ("header cut off", GPTQ, truncate("model.safetensors", 500), "gguf", BadFile, "truncated"),
    ("last byte cut off", GPTQ, truncate("model.safetensors", -1), "gguf", BadFile, "truncated"),
    ("half of the payload", DENSE, truncate("model.safetensors", -100_000), "gguf", BadFile, "truncated"),
    ("a git-lfs pointer for weights", GPTQ, replaced_by_text, "gguf", BadFile, "safetensors-header-too-large"),
    ("header length of 2^60", GPTQ, head_bytes((1 << 60).to_bytes(8, "little")), "gguf", BadFile, "safetensors-header-too-large"),
    ("header is no JSON", GPTQ, head_bytes((64).to_bytes(8, "little") + b"[" * 64), "gguf", BadFile, "safetensors-header"),
    ("offsets beyond the file", GPTQ, header(lying_offsets), "gguf", BadFile, "safetensors-span"),
    ("shape of 2^46 elements", GPTQ, header(lying_shape), "gguf", BadFile, "safetensors-span"),
    ("unknown dtype", GPTQ, header(unknown_dtype), "gguf", BadFile, "safetensors-dtype"),
    ("overlapping tensors", GPTQ, header(overlapping), "gguf", BadFile, "safetensors-offsets"),
    ("a pickle beside no safetensors", GPTQ, only_file("pytorch_model.bin", PICKLE), "gguf", Unsafe, "pickle"),
    ("no weights at all", GPTQ, remove("model.safetensors"), "gguf", BadFile, "no-weights"),
    ("two files, no index", GPTQ, both(shards(), remove("model.safetensors.index.json")), "gguf", BadFile, "index-missing"),
    ("a shard is missing", GPTQ, both(shards(), remove("model-00002-of-00002.safetensors")), "gguf", BadFile, "shard-missing"),
    ("a shard is truncated", GPTQ, both(shards(), truncate("model-00002-of-00002.safetensors", -9)), "gguf", BadFile, "truncated"),
    ("a tensor in two shards", GPTQ, shards(twice=True), "gguf", BadFile, "tensor-wrong-shard"),
    ("a shard name that climbs", GPTQ, shards(lambda m: {"weight_map": dict.fromkeys(m, "../model.safetensors")}),
     "gguf", Unsafe, "file-name"),
    ("an absolute shard name", GPTQ, shards(lambda m: {"weight_map": dict.fromkeys(m, "/etc/passwd")}), "gguf", Unsafe, "file-name"),
    ("a shard name with a zero byte", GPTQ, shards(lambda m: {"weight_map": dict.fromkeys(m, "a\0.safetensors")}),
     "gguf", Unsafe, "file-name"),
    ("index without a map", GPTQ, shards(lambda m: {}), "gguf", BadFile, "index"),
    ("index names what no shard holds", GPTQ, shards(lambda m: {"weight_map": {**m, "x.weight": next(iter(m.values()))}}), "gguf",
     BadFile, "tensor-missing"),
    ("index puts a tensor elsewhere", GPTQ,
     shards(lambda m: {"weight_map": {**m, next(iter(m)): sorted(set(m.values()))[0]}}), "gguf", BadFile, "tensor-wrong-shard"),
    ("index is a list", GPTQ, both(shards(), write("model.safetensors.index.json", "[]")), "gguf", BadFile, "index"),
    # configuration
    ("no config.json", GPTQ, remove("config.json", "quantize_config.json"), "gguf", BadFile, "config-missing"),
    ("config.json is no JSON", GPTQ, write("config.json", "{'model_type': 'llama'"), "gguf", BadFile, "json"),
    ("config.json is a list", GPTQ, write("config.json", "[1, 2]"), "gguf", BadFile, "json"),
    ("config.json is not UTF-8", GPTQ, write("config.json", b"\xff\xfe{}"), "gguf", BadFile, "json"),
    ("config.json nested 100 000 deep", GPTQ, write("config.json", "[" * 100_000), "gguf", BadFile, "json"),
    ("unknown architecture", GPTQ, config(model_type="mamba9", architectures=["Mamba9"]), "gguf", Unsupported, "architecture"),
    ("no model type", GPTQ, config(model_type=None, architectures=None), "gguf", Unsupported, "architecture"),
    ("unknown quantization method", GPTQ, quantization(quant_method="aqlm9"), "gguf", Unsupported, "quant-method"),
    ("quantization_config is a text", GPTQ, both(config(quantization_config="gptq"), remove("quantize_config.json")),
     "gguf", BadFile, "config-field"),
    ("bits say 8, planes say 4", GPTQ, quantization(bits=8), "gguf", BadFile, "bits-disagree"),
    ("bits is a text", GPTQ, quantization(bits="four"), "gguf", BadFile, "config-value"),
    ("five bits", GPTQ, quantization(bits=5), "gguf", BadFile, "bits-disagree"),
    ("group size 0", GPTQ, quantization(group_size=0), "gguf", BadFile, "config-value"),
    ("group size of another file", GPTQ, quantization(group_size=64), "gguf", BadFile, "group-size"),
    ("two labels that differ", GPTQ, quantization(checkpoint_format="gptq_v2", format="gptq"), "gguf", BadFile, "config-disagrees"),
    ("a Marlin file", GPTQ, quantization(checkpoint_format="marlin", format="marlin"), "gguf", Unsupported, "gptq-marlin"),
    ("an unknown checkpoint format", GPTQ, quantization(checkpoint_format="gptq_v7", format="gptq_v7"),
     "gguf", Unsupported, "gptq-version"),
    ("AWQ label on GPTQ planes", GPTQ, quantization(quant_method="awq", version="gemm"), "gguf", BadFile, "config-disagrees"),
    ("GPTQ label on AWQ planes", AWQ, quantization(quant_method="gptq"), "gguf", BadFile, "config-disagrees"),
    ("GEMV label on GEMM planes", AWQ, quantization(version="gemv"), "gguf", BadFile, "config-disagrees"),
    ("GEMM label on GEMV planes", GEMV, quantization(version="gemm"), "gguf", BadFile, "config-disagrees"),
    ("heads that do not divide", DENSE, config(num_attention_heads=7), "gguf", BadFile, "config-field"),
    ("more layers than there are", GPTQ, config(num_hidden_layers=5), "gguf", BadFile, "missing-tensor"),
    ("fewer layers than there are", GPTQ, config(num_hidden_layers=0), "gguf", BadFile, "config-field"),
    ("negative hidden size", GPTQ, config(hidden_size=-64), "gguf", BadFile, "config-field"),
    ("hidden size is a text", GPTQ, config(hidden_size="64"), "gguf", BadFile, "config-field"),
    ("vocabulary larger than the embedding", GPTQ, config(vocab_size=100_000), "gguf", BadFile, "tensor-shape"),
    ("tokenizer.json is no JSON", GPTQ, write("tokenizer.json", "{"), "gguf", BadFile, "json"),
    ("tokenizer.json is a list", GPTQ, write("tokenizer.json", "[]"), "gguf", BadFile, "json"),
    ("no tokenizer", GPTQ, remove("tokenizer.json"), "gguf", BadFile, "missing-tokenizer"),
    # tensors
    ("qzeros without scales", GPTQ, drop(f"{Q}.scales"), "gguf", BadFile, "missing-scales"),
    ("scales without qzeros", GPTQ, drop(f"{Q}.qzeros"), "gguf", BadFile, "missing-qzeros"),
    ("parameters without codes", GPTQ, drop(f"{Q}.qweight"), "gguf", BadFile, "missing-qweight"),
    ("a whole module is missing", GPTQ, drop(*(f"{Q}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx"))),
     "gguf", BadFile, "missing-tensor"),
    ("a norm is missing", GPTQ, drop("model.norm.weight"), "gguf", BadFile, "missing-tensor"),
    ("the embedding is missing", GPTQ, drop("model.embed_tokens.weight"), "gguf", BadFile, "missing-tensor"),
    ("a layer under another number", GPTQ, tensors(other_layer), "gguf", BadFile, "missing-tensor"),
    ("an expert is missing", MOE, tensors(lambda t: [t.pop(n) for n in list(t) if ".experts.1." in n]), "gguf", BadFile, "missing-tensor"),
    ("integer scales", GPTQ, retype(f"{Q}.scales", "I32", 4), "gguf", BadFile, "wrong-dtype"),
    ("float codes", GPTQ, retype(f"{Q}.qweight", "F32", 4), "gguf", BadFile, "wrong-dtype"),
    ("wide codes", GPTQ, retype(f"{Q}.qweight", "I64", 8), "gguf", BadFile, "wrong-dtype"),
    ("float8 norm", GPTQ, retype("model.norm.weight", "F8_E4M3", 1), "gguf", Unsupported, "not-float"),
    ("boolean embedding", DENSE, retype("model.embed_tokens.weight", "BOOL", 1), "gguf", Unsupported, "not-float"),
    ("qzeros of too few groups", GPTQ, reshape(f"{Q}.qzeros", lambda a: a[:1]), "gguf", BadFile, "wrong-shape"),
    ("scales of too few outputs", GPTQ, reshape(f"{Q}.scales", lambda a: a[:, :-8]), "gguf", BadFile, "wrong-shape"),
    ("codes of too few inputs", GPTQ, reshape(f"{Q}.qweight", lambda a: a[:4]), "gguf", BadFile, "wrong-shape"),
    ("codes with three dimensions", GPTQ, reshape(f"{Q}.qweight", lambda a: a[None]), "gguf", BadFile, "wrong-shape"),
    ("codes of no rows", GPTQ, reshape(f"{Q}.qweight", lambda a: a[:0]), "gguf", BadFile, "wrong-shape"),
    ("a norm of another width", GPTQ, reshape("model.norm.weight", lambda a: a[:-1]), "gguf", BadFile, "tensor-shape"),
    ("a norm with two dimensions", GPTQ, reshape("model.norm.weight", lambda a: a[None]), "gguf", BadFile, "tensor-shape"),
    ("an embedding of another width", DENSE, reshape("model.embed_tokens.weight", lambda a: a[:, :-2]), "gguf", BadFile, "tensor-shape"),
    ("a transposed projection", DENSE, reshape(f"{DOWN}.weight", lambda a: a.T), "gguf", BadFile, "tensor-shape"),
    ("negative group index", ACT, tensors(negative_index), "gguf:q8_0", BadFile, "g-idx-range"),
    ("group index beyond the groups", ACT, tensors(far_index), "gguf:q8_0", BadFile, "g-idx-range"),
    ("AWQ scales of too few groups", AWQ, reshape(f"{Q}.scales", lambda a: a[:1]), "gguf", BadFile, "group-size"),
    ("AWQ codes of too few outputs", AWQ, reshape(f"{Q}.qweight", lambda a: a[:, :-1]), "gguf", BadFile, "wrong-shape"),
    ("AWQ zeros missing", AWQ, drop(f"{Q}.qzeros"), "gguf", BadFile, "missing-qzeros"),
    ("a tensor no architecture knows", GPTQ, tensors(lambda t: t.update({"model.layers.0.mystery.weight": ("F16", [2, 2], bytes(8))})),
     "gguf", BadFile, "unmapped-tensor"),
    # GGUF
    ("GGUF cut in its header", "gguf", truncate("", 2000), "gptq", BadFile, "truncated"),
    ("GGUF cut in its payload", "gguf", truncate("", -5000), "gptq", BadFile, "truncated"),
    ("GGUF of version 9", "gguf", patch(4, struct.pack("<I", 9)), "gptq", Unsupported, "gguf-version"),
    ("GGUF of 2^60 tensors", "gguf", patch(8, struct.pack("<Q", 1 << 60)), "gptq", BadFile, "gguf-count"),
    ("GGUF of 2^60 keys", "gguf", patch(16, struct.pack("<Q", 1 << 60)), "gptq", BadFile, "gguf-count"),
    ("the old ggml magic", "gguf", patch(0, b"tjgg"), "gptq", Unsupported, "gguf-old-magic"),
    ("GGUF of an unknown architecture", "gguf", key("general.architecture", "str", "mamba9"), "hf", Unsupported, "architecture"),
    ("GGUF without architecture", "gguf", without_key("general.architecture"), "hf", BadFile, "gguf-key"),
    ("GGUF architecture is a number", "gguf", key("general.architecture", "u32", 7), "hf", BadFile, "gguf-key"),
    ("GGUF without block count", "gguf", without_key("llama.block_count"), "hf", BadFile, "config-field"),
    ("GGUF with heads that do not divide", "gguf", key("llama.attention.head_count", "u32", 7), "hf", BadFile, "config-field"),
    ("GGUF with zero heads", "gguf", key("llama.attention.head_count", "u32", 0), "hf", BadFile, "config-field"),
    ("GGUF with more layers than there are", "gguf", key("llama.block_count", "u32", 9), "hf", BadFile, "missing-tensor"),
    ("GGUF with a text for layers", "gguf", key("llama.block_count", "str", "one"), "hf", BadFile, "config-field"),
    ("GGUF without tokens", "gguf", without_key("tokenizer.ggml.tokens"), "hf", BadFile, "tokenizer"),
    ("GGUF without a projection", "gguf", without_tensor("blk.0.attn_q.weight"), "hf", BadFile, "missing-tensor"),
    ("GGUF without its embedding", "gguf", without_tensor("token_embd.weight"), "hf", BadFile, "missing-tensor"),
    ("GGUF projection of another shape", "gguf", tensor_shape("blk.0.attn_q.weight", (32, 64)), "hf", BadFile, "tensor-shape"),
    ("GGUF of a block type that is not read", "gguf", retyped("blk.0.attn_q.weight", "Q8_1"), "hf", Unsupported, "ggml-type"),
    ("GGUF of integers", "gguf", retyped("blk.0.attn_q.weight", "I8"), "hf", Unsupported, "not-float"),
    ("text in place of a GGUF", "gguf", replaced_file(b"not a model" * 100), "gptq", BadFile, "gguf-magic"),
    ("an empty GGUF", "gguf", replaced_file(b""), "gptq", BadFile, "gguf-magic"),
    ("provenance is no JSON", "gguf", key(PROVENANCE_KEY, "str", "{"), "gptq", BadFile, "provenance"),
    ("provenance is a number", "gguf", key(PROVENANCE_KEY, "u32", 7), "gptq", BadFile, "provenance"),
    ("provenance is a list", "gguf", key(PROVENANCE_KEY, "str", "[1]"), "gptq", BadFile, "provenance"),
    ("provenance without its restore part", "gguf", record(lambda r: r.pop("restore")), "gptq", BadFile, "provenance"),
    ("provenance with other options", "gguf", record(lambda r: r["options"].update(to="gguf:q8_0")), "gptq", BadFile, "provenance"),
    ("provenance without a digest", "gguf", record(lambda r: r.pop("digest")), "gptq", BadFile, "provenance"),
    ("provenance with another storage", "gguf", record(lambda r: r["restore"]["storages"][0].update(bits=3)),
     "gptq", BadFile, "provenance"),
    # requests
    ("unknown target", GPTQ, lambda source: None, "ggfu", UsageError, "unknown-format"),
    ("unknown type", GPTQ, lambda source: None, "gguf:q9_9", UsageError, "target-type"),
    ("unknown option", GPTQ, lambda source: None, "gptq:int4,colour=red", UsageError, "target-option"),
    ("group of letters", DENSE, lambda source: None, "gptq:int4,group=many", UsageError, "option"),
    ("several widths into one AWQ file", "gptq/dynamic-mixed", lambda source: None, "awq", WouldLose, "requantize"),
    ("act-order that needs new codes", ACT, lambda source: None, "gguf", WouldLose, "requantize"),
    ("infinite scale times a zero point", AWQ, not_finite(f"{Q}.scales", float("inf")), "gguf:q4_1", BadFile, "not-finite"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checkpoints import converted

    work = tmp_path_factory.mktemp("bases")
    converted(ready(GPTQ, work), work / "gguf", "gguf")
    return work


def source_of(base: str, bases: Path, directory: Path) -> Path:
    if base == "gguf":
        return Path(shutil.copy(bases / "gguf", directory / "model.gguf"))
    return Path(shutil.copytree(ready(base, bases), directory / "source"))


@pytest.mark.parametrize(("base", "change", "to", "kind", "code"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_one_error_and_nothing_written(
    base: str, change: Change, to: str, kind: type[QFormatError], code: str, bases: Path, tmp_path: Path
) -> None:
    source = source_of(base, bases, tmp_path)
    change(source)
    before, there = digest(source), names_in(tmp_path)
    with pytest.raises(QFormatError) as caught:
        convert(source, tmp_path / "out", to=to)
    assert isinstance(caught.value, kind) and caught.value.code == code, caught.value
    assert "\n" not in str(caught.value) and str(caught.value)
    assert names_in(tmp_path) == there and digest(source) == before

"""BERT as an embedding model: no head, no cache, learned positions, WordPiece.

Facts: llama.cpp, ``conversion/bert.py`` and ``src/models/bert.cpp``, which adds the first token type everywhere and computes GELU by its
hyperbolic tangent; config defaults: transformers 5, ``models/bert/configuration_bert.py``. The pooler and the heads of pre-training are
left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import Field, positive
from qformats.architectures.mapping import Rule
from qformats.architectures.metadata import json_file
from qformats.errors import BadFile, Unsupported

__all__ = ["BERT", "pooled_files", "pooling_type"]

LAYER = "encoder.layer.{i}."
POOLING_FILE = "1_Pooling/config.json"  # where sentence-transformers keeps it
_LABELS = "classifier.output_labels"
_POOLING = {"mean": 1, "cls": 2, "lasttoken": 3}  # llama.cpp's numbers; 0 is none


def pooling_type(files: Mapping[str, bytes]) -> int | None:
    """llama.cpp's number for what sentence-transformers pools by, None where it says nothing; ``Unsupported('pooling')``."""
    if "modules.json" not in files or POOLING_FILE not in files:
        return None
    found = json_file(files, POOLING_FILE) or {}
    modes = [name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for name in found if found[name] is True]
    modes += [found["pooling_mode"]] if isinstance(found.get("pooling_mode"), str) else []
    known = [_POOLING[mode] for mode in modes if mode in _POOLING]
    if not known:
        raise Unsupported("pooling", f"pooling by {modes} has no word in GGUF", path=POOLING_FILE, hint="mean, cls and lasttoken have")
    return min(known)


def pooled_files(number: int, width: int) -> dict[str, Any]:
    """The side files, as JSON data, by which sentence-transformers pools embeddings of ``width`` so; none where nothing is pooled."""
    word = next((word for word, known in _POOLING.items() if known == number), None)
    if word is None:
        return {}
    names = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken"}
    stages = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"} for i, (p, t) in enumerate(stages)]
    modes = {name: mode == word for mode, name in names.items()}
    return {"modules.json": modules, POOLING_FILE: {"word_embedding_dimension": width, **modes}}


def _derive(full: dict[str, Any]) -> None:
    full["num_key_value_heads"] = full.get("num_attention_heads")


def _letters(full: Mapping[str, Any]) -> dict[str, int]:
    return {"Y": positive(full, "type_vocab_size")}


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The names of a classifier's classes, which llama.cpp keeps without one; not the two that transformers makes up."""
    named = full.get("id2label")
    if named is None:
        return []
    if not isinstance(named, Mapping) or not all(str(key).isdecimal() and isinstance(name, str) for key, name in named.items()):
        raise BadFile("config-field", f"config field 'id2label' is {named!r}, expected names by number")
    labels = [name for _, name in sorted((int(key), name) for key, name in named.items())]
    return [(_LABELS, "[str]", labels)] if labels and (len(labels) != 2 or labels[0] != "LABEL_0") else []


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    if (labels := values.get(_LABELS)) is not None:
        config["id2label"] = {str(number): name for number, name in enumerate(labels)}
        config["label2id"] = {name: number for number, name in enumerate(labels)}
    for name in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings"):
        config.pop(name, None)


BERT = Architecture(
    name="bert",
    gguf="bert",
    hf_classes=("BertModel", "BertForMaskedLM"),
    model_types=("bert",),
    rules=(
        Rule("embeddings.LayerNorm", "token_embd_norm", "H", "norm", bias=True),
        Rule("embeddings.position_embeddings", "position_embd", "PH", "positions"),
        Rule("embeddings.token_type_embeddings", "token_types", "YH", "positions"),
        Rule("embeddings.word_embeddings", "token_embd", "TH", "embedding"),
        Rule(LAYER + "attention.self.query", "blk.{i}.attn_q", "QH", bias=True),
        Rule(LAYER + "attention.self.key", "blk.{i}.attn_k", "VH", bias=True),
        Rule(LAYER + "attention.self.value", "blk.{i}.attn_v", "VH", bias=True),
        Rule(LAYER + "attention.output.dense", "blk.{i}.attn_output", "HQ", bias=True),
        Rule(LAYER + "attention.output.LayerNorm", "blk.{i}.attn_output_norm", "H", "norm", bias=True),
        Rule(LAYER + "intermediate.dense", "blk.{i}.ffn_up", "FH", bias=True),
        Rule(LAYER + "output.dense", "blk.{i}.ffn_down", "HF", bias=True),
        Rule(LAYER + "output.LayerNorm", "blk.{i}.layer_output_norm", "H", "norm", bias=True),
    ),
    before=(
        Field("block_count", "u32", "num_hidden_layers"), Field("context_length", "u32", "max_position_embeddings"),
        Field("embedding_length", "u32", "hidden_size"), Field("feed_forward_length", "u32", "intermediate_size"),
        Field("attention.head_count", "u32", "num_attention_heads"), Field("attention.layer_norm_epsilon", "f32", "layer_norm_eps"),
    ),
    first_own_key="attention.causal",
    after=(Field("attention.causal", "bool", constant=False),),
    defaults={
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "rope_theta": 10000.0,
    },
    rebuilt={"architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu"},
    fixed={
        "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"), "is_decoder": (False,), "add_cross_attention": (False,),
        "position_embedding_type": ("absolute",),
    },
    left_out={
        "pooler.": "the pooler; llama.cpp computes embeddings without it", "cls.": "a head of pre-training; only embeddings are computed",
    },
    free_heads=False,
    plain_rope=False,
    complete=_derive,
    letters=_letters,
    adjust=_rebuild,
    own_keys=_own_keys,
    pooling=pooling_type,
    pooled_files=pooled_files,
)  # fmt: skip

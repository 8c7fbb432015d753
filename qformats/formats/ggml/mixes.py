"""llama.cpp's file types: which block type each tensor of a GGUF gets, so that a file of ours has the types of llama.cpp's own.

A file type (``q4_k_m``) is a number for ``general.file_type``, a block type for most tensors and exceptions (``mix_rules``); ``choose``
gives every tensor's type. Rows that are not whole blocks get a type of smaller blocks last.

Facts: llama.cpp v0.5.0, ``src/llama-quant.cpp`` (llama_tensor_get_type, tensor_allows_quantization, tensor_type_fallback,
tensor_requires_imatrix), ``include/llama.h`` (numbers), ``tools/quantize/quantize.cpp`` (names).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from qformats.errors import Unsupported
from qformats.formats.ggml import BLOCK_TYPES
from qformats.formats.ggml.mix_rules import LOW, RULES, Model, Place, role_of

__all__ = [
    "ALIASES",
    "FILE_TYPES",
    "FileType",
    "Model",
    "Wish",
    "allows_quantization",
    "choose",
    "fallback",
    "file_type",
    "is_block_type",
    "requires_imatrix",
]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileType:
    """``name`` as in a target (``q4_k_m``), ``number`` its llama_ftype, ``block`` the type of tensors that no rule speaks of."""

    name: str
    number: int
    block: str


FILE_TYPES: dict[str, FileType] = {
    name: FileType(name, number, block)
    for name, number, block in (
        ("f32", 0, "f32"), ("f16", 1, "f16"), ("bf16", 32, "bf16"),
        ("q4_0", 2, "q4_0"), ("q4_1", 3, "q4_1"), ("q5_0", 8, "q5_0"), ("q5_1", 9, "q5_1"), ("q8_0", 7, "q8_0"),
        ("q2_k", 10, "q2_k"), ("q2_k_s", 21, "q2_k"), ("q3_k_s", 11, "q3_k"), ("q3_k_m", 12, "q3_k"), ("q3_k_l", 13, "q3_k"),
        ("q4_k_s", 14, "q4_k"), ("q4_k_m", 15, "q4_k"), ("q5_k_s", 16, "q5_k"), ("q5_k_m", 17, "q5_k"), ("q6_k", 18, "q6_k"),
        ("iq1_s", 24, "iq1_s"), ("iq1_m", 31, "iq1_m"), ("iq2_xxs", 19, "iq2_xxs"), ("iq2_xs", 20, "iq2_xs"), ("iq2_s", 28, "iq2_xs"),
        ("iq2_m", 29, "iq2_s"), ("iq3_xxs", 23, "iq3_xxs"), ("iq3_xs", 22, "iq3_s"), ("iq3_s", 26, "iq3_s"), ("iq3_m", 27, "iq3_s"),
        ("iq4_nl", 25, "iq4_nl"), ("iq4_xs", 30, "iq4_xs"), ("tq1_0", 36, "tq1_0"), ("tq2_0", 37, "tq2_0"),
        ("mxfp4_moe", 38, "mxfp4"), ("q1_0", 40, "q1_0"), ("q2_0", 41, "q2_0"),
    )
}  # fmt: skip
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

_FLOATS = ("f32", "f16", "bf16")
# a type of smaller blocks for rows that are not whole blocks; float16 where these do not fit either
_SMALLER = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
}  # fmt: skip


def file_type(name: str) -> FileType | None:
    """The file type of a target's type name, aliases resolved; None for what is none (``mxfp4``)."""
    return FILE_TYPES.get(ALIASES.get(name, name))


def is_block_type(name: str) -> bool:
    """Whether a name is a type that a tensor can have (``q4_k``, ``f16``) rather than a file type alone (``q4_k_m``)."""
    return name in _FLOATS or name.upper() in BLOCK_TYPES


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for: a file type, and what llama-quantize's options of the same names change of its rules.

    ``tensor_types``: (regular expression, block type), the first that is found in a name wins. ``pure``: no rules at all.
    """

    file_type: FileType
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    with_imatrix: bool = False


# ---------------------------------------------------------------- which tensors

_NEVER = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight", "time_mix_w0.weight",
    "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight",
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd",
    "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip


def allows_quantization(name: str, shape: Shape) -> bool:
    """Whether llama.cpp ever changes a tensor's type: weights of two or more dimensions that are no norms, routers or small odd ones."""
    dimensions = len(shape) - next((at for at, size in enumerate(shape) if size > 1), max(len(shape) - 1, 0))
    odd = name in ("position_embd.weight", "token_types.weight") or any(part in name for part in _NEVER)
    return dimensions >= 2 and name.endswith("weight") and not odd


def fallback(block: str, columns: int) -> str:
    """``block``, or what llama.cpp takes where rows of ``columns`` weights are not whole blocks of it.

    ``Unsupported('k-multiple')`` for the types that it has no smaller one for (Q1_0, NVFP4).

    >>> fallback("q4_k", 576), fallback("q6_k", 100), fallback("q4_0", 64)
    ('q5_0', 'f16', 'q4_0')
    """
    if block in _FLOATS or not columns % _block_size(block):
        return block
    smaller = _SMALLER.get(block)
    if smaller is None and _block_size(block) > 32:
        reason = f"rows of {columns} weights are not whole {block} blocks of {_block_size(block)}, and no smaller type stands in for it"
        raise Unsupported("k-multiple", reason, hint="name a type for these tensors: --tensor-type REGEX=TYPE")
    return smaller if smaller is not None and not columns % _block_size(smaller) else "f16"


def _block_size(block: str) -> int:
    return BLOCK_TYPES[block.upper()].block


def requires_imatrix(name: str, block: str, kind: FileType) -> bool:
    """Whether llama.cpp refuses to make this tensor without an importance matrix."""
    if role_of(name) in ("embedding", "output"):
        return False
    return block in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs") or (block == "q2_k" and kind.name == "q2_k_s")


# ---------------------------------------------------------------- the choice


def choose(wish: Wish, model: Model, tensors: Mapping[str, Shape]) -> dict[str, str]:
    """The type, in lower case, of every tensor whose type llama.cpp would change; the others are left as they are.

    ``tensors``: all names and shapes of the file, row-major, (N, K) or (E, N, K), in any order. Raises ``Unsupported`` with
    ``k-multiple`` (see ``fallback``) and ``layer-number`` for experts whose name tells no layer.

    >>> model = Model("llama", layers=2)
    >>> choose(Wish(FILE_TYPES["q4_0"]), model, {"token_embd.weight": (64, 256), "blk.0.attn_q.weight": (64, 256)})
    {'token_embd.weight': 'q6_k', 'blk.0.attn_q.weight': 'q4_0'}
    """
    chooser = _Chooser(wish, model, tensors)
    chosen = {name: chooser.decide(name, tensors[name]) for name in sorted(tensors, key=_place_in_file)}
    return {name: kind for name in tensors if (kind := chosen[name]) is not None}


def _place_in_file(name: str) -> tuple[int, bytes]:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1, name.encode()


@dataclass
class _Chooser:
    """Walks over tensors in llama.cpp's order and counts those of each role that a rule was asked for."""

    wish: Wish
    model: Model
    tensors: Mapping[str, Shape]
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        roles: Counter[str] = Counter(map(role_of, self.tensors))
        self.tied = not roles["output"]
        self.counts = {"values": roles["values"], **dict.fromkeys(("down", "gate", "up"), self.model.layers)}
        self.patterns = [(re.compile(pattern, re.IGNORECASE), block) for pattern, block in self.wish.tensor_types]

    def decide(self, name: str, shape: Shape) -> str | None:
        """None: the tensor stays as it is."""
        if not allows_quantization(name, shape):
            return None
        wish, role, named = self.wish, role_of(name), self._by_name(name)
        if role == "embedding" and wish.embedding_type is not None and not (named and name != "token_embd.weight"):
            return fallback(wish.embedding_type, shape[-1])
        if role == "output" and wish.output_type is not None:
            return fallback(wish.output_type, shape[-1])
        if wish.file_type.block in _FLOATS:
            return wish.file_type.block
        if named is None:
            named = wish.file_type.block if wish.pure else self._by_rules(name, role, shape)
        return fallback(named, shape[-1])

    def _by_name(self, name: str) -> str | None:
        return next((block for pattern, block in self.patterns if pattern.search(name)), None)

    def _by_rules(self, name: str, role: str, shape: Shape) -> str:
        kind, block = self.wish.file_type.name, self.wish.file_type.block
        if role == "output" or (role == "embedding" and self.tied):
            return self.wish.output_type or self._output(shape[-1])
        if kind == "mxfp4_moe":
            experts = len(shape) > 2 and shape[-3] > 1 and (self.model.architecture != "bailingmoe3" or role in ("up", "gate", "down"))
            return "mxfp4" if experts else "q8_0"
        place = self._place(name, role)
        block = next((to for condition, to in RULES.get(role, {}).get(kind, ()) if condition(place)), block)
        return block if kind in LOW else self._for_large_models(role, block)

    def _output(self, columns: int) -> str:
        kind, block = self.wish.file_type.name, self.wish.file_type.block
        if kind == "mxfp4_moe" or self.model.architecture == "falcon" or columns % _block_size(block) or block == "q8_0":
            return "q8_0"
        return "q5_k" if kind in LOW or kind == "iq3_xxs" else "q6_k"

    def _place(self, name: str, role: str) -> Place:
        """Where experts are, layers count by name; elsewhere by how many of the role came before."""
        index, count = self.seen[role], self.counts.get(role, 0)
        self.seen[role] += 1
        if role in ("down", "gate", "up") and self.model.experts > 1 and self.wish.file_type.name not in LOW:
            index = _place_in_file(name)[0]
            if not 0 <= index < count:
                raise Unsupported("layer-number", f"{name} is in none of the {count} layers", tensor=name)
        return Place(index, count, self.model, self.wish.with_imatrix)

    def _for_large_models(self, role: str, block: str) -> str:
        """Keys and values are small beside the rest of 8-expert models, values beside that of 70B models."""
        if role in ("keys", "values") and self.model.experts == 8:
            return "q8_0"
        return "q5_k" if role == "values" and self.model.is_70b and block in ("q3_k", "q4_k") else block

"""The rules of llama.cpp's file types as tables: role of a tensor, file type, then (condition, block type) pairs, the first that holds.

Conditions look at a tensor's place among those of its role, at the model (query heads a key-value head, experts, falcon) and at
whether there is an importance matrix. ``mixes`` walks over a file's tensors and applies them.

Facts: llama.cpp v0.5.0, ``src/llama-quant.cpp`` (llama_tensor_get_type_impl, tensor_get_category), ``src/models/*.cpp`` (what is a 70B).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LOW", "RULES", "Model", "Place", "role_of"]

LOW = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m"})  # they count layers, values and heads in a way of their own

# ---------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class Model:
    """What rules look at: ``gqa`` query heads a key-value head of the first layer (0 where it has none), ``experts`` 0 without."""

    architecture: str
    layers: int
    heads: int = 1
    heads_kv: int = 1
    experts: int = 0

    @property
    def gqa(self) -> int:
        return self.heads // self.heads_kv if self.heads_kv else 0

    @property
    def is_70b(self) -> bool:
        """Models that llama.cpp calls 70B by their number of layers."""
        if self.architecture in ("llama", "llama-embed"):
            return self.layers == 80 and self.heads != self.heads_kv and self.experts != 8
        return self.layers == {"qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}.get(self.architecture)

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Model:
        """From a GGUF's keys, plain values; what a key does not say is as llama.cpp assumes."""
        name = str(metadata.get("general.architecture", ""))

        def number(key: str, default: int) -> int:
            found = metadata.get(f"{name}.{key}", default)
            if not isinstance(found, int | float):
                found = next(iter(found), default)
            return int(found)

        heads = number("attention.head_count", 1)
        return cls(name, number("block_count", 0), heads, number("attention.head_count_kv", heads), number("expert_count", 0))


# ---------------------------------------------------------------- conditions


@dataclass(frozen=True, slots=True)
class Place:
    """Tensor number ``index`` of ``count`` of its role, in ``model``."""

    index: int
    count: int
    model: Model
    with_imatrix: bool


Condition = Callable[[Place], bool]
Rules = Mapping[str, tuple[tuple[Condition, str], ...]]


def _always(place: Place) -> bool:
    return True


def _grouped(place: Place) -> bool:
    return place.model.gqa >= 4


def _grouped_or_experts(place: Place) -> bool:
    return _grouped(place) or place.model.experts >= 4


def _eight_experts(place: Place) -> bool:
    return place.model.experts == 8


def _falcon(place: Place) -> bool:
    return place.model.architecture == "falcon"


def _without_imatrix(place: Place) -> bool:
    return not place.with_imatrix


def _first(part: int) -> Condition:
    return lambda place: place.index < place.count // part


def _below(index: int) -> Condition:
    return lambda place: place.index < index


def _more_bits(place: Place) -> bool:
    """The first and the last eighth, and every third layer between."""
    start = place.count // 8
    return place.index < start or place.index >= 7 * place.count // 8 or (place.index - start) % 3 == 2


def _middle(place: Place) -> bool:
    return place.count // 8 <= place.index < 7 * place.count // 8


def _both(*conditions: Condition) -> Condition:
    return lambda place: all(condition(place) for condition in conditions)


def _either(*conditions: Condition) -> Condition:
    return lambda place: any(condition(place) for condition in conditions)


def _unless(condition: Condition) -> Condition:
    return lambda place: not condition(place)


def _for(names: str, *rules: tuple[Condition, str]) -> dict[str, tuple[tuple[Condition, str], ...]]:
    return dict.fromkeys(names.split(), rules)


# ---------------------------------------------------------------- rules by role

_VALUES: Rules = {
    **_for("iq1_s iq1_m iq2_xxs iq2_xs", (_grouped_or_experts, "q4_k"), (_always, "q2_k")),
    **_for("iq2_s iq2_m", (_grouped_or_experts, "q4_k"), (_always, "iq3_s")),
    **_for("q2_k", (_grouped, "q4_k"), (_always, "q3_k")),
    **_for("q2_k_s iq3_xs iq3_s", (_grouped, "q4_k")),
    **_for("iq3_xxs", (_grouped, "q4_k"), (_without_imatrix, "iq3_s")),
    **_for("iq3_m", (_always, "q4_k")),
    **_for("q3_k_m", (_below(2), "q5_k"), (_always, "q4_k")),
    **_for("q3_k_l", (_always, "q5_k")),
    **_for("iq4_nl iq4_xs", (_grouped, "q5_k")),
    **_for("q4_k_m q5_k_m", (_more_bits, "q6_k")),
    **_for("q4_k_s", (_below(4), "q5_k")),
}
_KEYS: Rules = {
    **_for(" ".join(sorted(LOW)), (_eight_experts, "q4_k")),
    **_for("iq3_xs", (_always, "iq3_xxs")),
    **_for("iq3_xxs", (_always, "iq2_s")),
}
_QUERIES: Rules = {**_for("iq3_xs", (_always, "iq3_xxs")), **_for("iq3_xxs", (_always, "iq2_s"))}
_ATTENTION_OUTPUT: Rules = {
    **_for("iq1_s iq1_m", (_eight_experts, "q5_k"), (_always, "iq2_xxs")),
    **_for("iq2_xxs iq2_xs", (_eight_experts, "q5_k")),
    **_for("iq2_s iq2_m", (_eight_experts, "q5_k"), (_always, "iq3_s")),
    **_for("iq3_xs iq3_s iq4_nl iq4_xs q3_k_s q4_k_s q4_k_m", (_both(_eight_experts, _unless(_falcon)), "q5_k")),
    **_for("q2_k", (_falcon, "q2_k"), (_eight_experts, "q5_k"), (_always, "q3_k")),
    **_for("iq3_xxs", (_falcon, "iq3_xxs"), (_eight_experts, "q5_k"), (_always, "iq3_s")),
    **_for("q3_k_m", (_falcon, "q3_k"), (_eight_experts, "q5_k"), (_always, "q4_k")),
    **_for("q3_k_l", (_falcon, "q4_k"), (_eight_experts, "q3_k"), (_always, "q5_k")),
    **_for("iq3_m", (_falcon, "iq3_s"), (_eight_experts, "q5_k"), (_always, "q4_k")),
}
_DOWN: Rules = {
    **_for("iq1_s iq1_m iq2_xxs iq2_xs", (_first(8), "q2_k")),
    **_for("iq2_s iq2_m", (_first(8), "iq3_s")),
    **_for("q2_k", (_always, "q3_k")),
    **_for("q2_k_s", (_first(8), "q4_k")),
    **_for("iq3_xxs", (_both(_without_imatrix, _first(8)), "q4_k"), (_without_imatrix, "q3_k")),
    **_for("q3_k_m", (_first(16), "q5_k"), (_either(_unless(_falcon), _more_bits), "q4_k")),
    **_for("q3_k_l", (_falcon, "q4_k"), (_always, "q5_k")),
    **_for("iq3_m", (_either(_first(8), _both(_eight_experts, _more_bits)), "q4_k")),
    **_for("q4_k_m", (_both(_falcon, _first(16)), "q6_k"), (_both(_falcon, _more_bits), "q5_k"), (_falcon, "q4_k"), (_more_bits, "q6_k")),
    **_for("q4_k_s", (_both(_unless(_falcon), _first(8)), "q5_k")),
    **_for("q5_k_m", (_more_bits, "q6_k")),
    **_for("iq4_nl iq4_xs", (_both(_without_imatrix, _first(8)), "q5_k")),
    **_for("q4_0", (_both(_unless(_without_imatrix), _first(8)), "q4_1")),
    **_for("q5_0", (_both(_unless(_without_imatrix), _first(8)), "q5_1")),
}
_GATE_AND_UP: Rules = _for("iq3_xs", (_middle, "iq3_xxs"))
_EMBEDDING: Rules = {
    **_for("iq1_s iq1_m iq2_xxs iq2_xs", (_always, "q2_k")),
    **_for("iq2_s iq2_m iq3_xxs", (_always, "iq3_s")),
    **_for("tq1_0 tq2_0 q2_0", (_always, "q4_k")),
}
# what a name holds makes its role; the first that is found
_ROLES = (
    ("attn_qkv.weight", "values"), ("attn_kv_b.weight", "values"), ("attn_v.weight", "values"), ("attn_k.weight", "keys"),
    ("attn_q.weight", "queries"), ("attn_output.weight", "attention output"), ("ffn_up", "up"), ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)  # fmt: skip
RULES: Mapping[str, Rules] = {
    "values": _VALUES, "keys": _KEYS, "queries": _QUERIES, "attention output": _ATTENTION_OUTPUT, "down": _DOWN,
    "gate": _GATE_AND_UP, "up": _GATE_AND_UP, "embedding": _EMBEDDING,
}  # fmt: skip


def role_of(name: str) -> str:
    """``output``, ``embedding``, ``values`` (also fused projections), ``keys``, ``queries`` …; ``other`` where no rule looks."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((role for part, role in _ROLES if part in name), "other")

"""Granite 3 with experts, and with a shared expert beside them: gate and up are one tensor in HF.

Facts: llama.cpp, ``conversion/granite.py`` ``GraniteMoeModel`` and ``src/models/granite.cpp``; config defaults: transformers 5,
``models/granitemoe`` and ``models/granitemoeshared``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qformats.architectures.fields import ATTENTION, EXPERTS, NORM, Field, positive
from qformats.architectures.granite import GRANITE
from qformats.architectures.llama import LLAMA
from qformats.architectures.mapping import Rule
from qformats.architectures.splits import Split

__all__ = ["GRANITEMOE"]

MOE = "model.layers.{i}.block_sparse_moe."
STACK = MOE + "experts"  # in transformers 5, which may save it so
SHARED = "model.layers.{i}.shared_mlp."
_COMMON = tuple(rule for rule in LLAMA.rules if ".mlp." not in rule.hf)


def _derive(full: dict[str, Any]) -> None:
    full["has_shared"] = bool(full.get("shared_intermediate_size"))


def _letters(full: Mapping[str, Any]) -> dict[str, int]:
    return {"s": positive(full, "shared_intermediate_size") if full["has_shared"] else 1}


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    if config.pop("has_shared", False):
        config.update(model_type="granitemoeshared", architectures=["GraniteMoeSharedForCausalLM"])
    config.pop("head_dim", None)


GRANITEMOE = replace(
    GRANITE,
    name="granitemoe",
    gguf="granitemoe",
    hf_classes=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    model_types=("granitemoe", "granitemoeshared"),
    rules=(
        _COMMON[0],
        Rule(MOE + "input_linear", "blk.{i}.ffn_gate_exps", "EFH", "experts", split=Split("runs", "weight", 0, 2),
             fused=("gate_up_proj", 0, 2), stack=STACK),
        Rule(MOE + "input_linear", "blk.{i}.ffn_up_exps", "EFH", "experts", split=Split("runs", "weight", 1, 2),
             fused=("gate_up_proj", 1, 2), stack=STACK),
        Rule(MOE + "output_linear", "blk.{i}.ffn_down_exps", "EHF", "experts", split=Split("runs", "weight"),
             fused=("down_proj", 0, 1), stack=STACK),
        Rule(MOE + "router.layer", "blk.{i}.ffn_gate_inp", "EH", "router"),
        Rule(SHARED + "input_linear", "blk.{i}.ffn_gate_shexp", "sH", split=Split("runs", "weight", 0, 2), when="has_shared"),
        Rule(SHARED + "input_linear", "blk.{i}.ffn_up_shexp", "sH", split=Split("runs", "weight", 1, 2), when="has_shared"),
        Rule(SHARED + "output_linear", "blk.{i}.ffn_down_shexp", "Hs", when="has_shared"),
        *_COMMON[1:],
    ),
    before=ATTENTION,
    after=(
        *NORM, *EXPERTS, *GRANITE.after[1:], Field("expert_shared_feed_forward_length", "u32", "shared_intermediate_size"),
    ),
    defaults={**GRANITE.defaults, "num_experts": 8, "num_experts_per_tok": 2},
    rebuilt={"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "hidden_act": "silu"},
    names={"num_experts": "num_local_experts"},
    complete=_derive,
    letters=_letters,
    adjust=_rebuild,
)  # fmt: skip

"""Mamba and Falcon Mamba: selective state spaces, no attention, no feed-forward part.

Facts: llama.cpp, ``conversion/mamba.py`` ``MambaModel``, ``src/models/mamba.cpp`` and ``mamba-base.cpp``; config defaults: transformers 5,
``models/mamba`` and ``models/falcon_mamba``. A GGUF has the decay itself, -exp of HF's logarithm. Falcon's norms inside of a mixer have no
weights, and llama.cpp computes them with the epsilon of all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import Field, positive
from qformats.architectures.mapping import Rule
from qformats.errors import Unsupported

__all__ = ["MAMBA"]

LAYER = "backbone.layers.{i}."
MIXER = LAYER + "mixer"
_SMALLEST = 1e-5  # the epsilon of all norms but Falcon's inner ones
_UNUSED = ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "rope_theta")


def _derive(full: dict[str, Any]) -> None:
    """Sizes that follow from others; one head of two stands for the heads there are not."""
    hidden = positive(full, "hidden_size")
    is_falcon = full.get("model_type") == "falcon_mamba" or "FalconMambaForCausalLM" in (full.get("architectures") or ())
    full.setdefault("mixer_norms", is_falcon)
    full.setdefault("intermediate_size", full["expand"] * hidden)
    if full["intermediate_size"] != 2 * hidden:
        found = full["intermediate_size"]
        raise Unsupported("config-value", f"the inner size is {found}; llama.cpp's 'mamba' only knows twice the hidden size, {2 * hidden}")
    if full.get("time_step_rank", "auto") == "auto":
        full["time_step_rank"] = -(-hidden // 16)
    full.update(num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    if not full["mixer_norms"] or full.setdefault("mixer_rms_eps", 1e-6) == full["layer_norm_epsilon"]:
        full.pop("mixer_rms_eps", None)


def _letters(full: Mapping[str, Any]) -> dict[str, int]:
    inner, states, rank = (positive(full, name) for name in ("intermediate_size", "state_size", "time_step_rank"))
    return {"J": 2 * inner, "N": states, "r": rank, "x": rank + 2 * states, "C": positive(full, "conv_kernel")}


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name in _UNUSED:
        config.pop(name, None)
    if config.pop("mixer_norms", False):
        config.update(model_type="falcon_mamba", architectures=["FalconMambaForCausalLM"])
        config["mixer_rms_eps"] = config.get("layer_norm_epsilon", _SMALLEST)


MAMBA = Architecture(
    name="mamba",
    gguf="mamba",
    hf_classes=("MambaForCausalLM", "FalconMambaForCausalLM"),
    model_types=("mamba", "falcon_mamba"),
    rules=(
        Rule("backbone.embeddings", "token_embd", "TH", "embedding"),
        Rule(LAYER + "norm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(MIXER, "blk.{i}", "FN", "state", leaf="A_log", gguf_leaf="ssm_a", function="-exp(x)"),
        Rule(MIXER, "blk.{i}", "F", "state", leaf="D", gguf_leaf="ssm_d"),
        Rule(MIXER + ".conv1d", "blk.{i}.ssm_conv1d", "FC", "conv", bias=True, hf_shape="F1C"),
        Rule(MIXER + ".in_proj", "blk.{i}.ssm_in", "JH"),
        Rule(MIXER + ".x_proj", "blk.{i}.ssm_x", "xF"),
        Rule(MIXER + ".dt_proj", "blk.{i}.ssm_dt", "Fr", bias=True),
        Rule(MIXER + ".out_proj", "blk.{i}.ssm_out", "HF"),
        Rule("backbone.norm_f", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=(
        Field("context_length", "u32", constant=1 << 20), Field("embedding_length", "u32", "hidden_size"),
        Field("feed_forward_length", "u32", constant=0), Field("attention.head_count", "u32", constant=0),
        Field("block_count", "u32", "num_hidden_layers"), Field("ssm.conv_kernel", "u32", "conv_kernel"),
        Field("ssm.inner_size", "u32", "intermediate_size"), Field("ssm.state_size", "u32", "state_size"),
        Field("ssm.time_step_rank", "u32", "time_step_rank"), Field("attention.layer_norm_rms_epsilon", "f32", "layer_norm_epsilon"),
        Field("ssm.dt_b_c_rms", "bool", "mixer_norms"),
    ),
    after=(),
    defaults={
        "vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32, "layer_norm_epsilon": _SMALLEST, "expand": 2,
        "conv_kernel": 4, "tie_word_embeddings": True, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "rope_theta": 10000.0,
    },
    rebuilt={
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
    },
    fixed={"use_bias": (False,), "use_conv_bias": (True,), "hidden_act": ("silu",)},
    ignored={"mixer_rms_eps": ("layer_norm_epsilon",)},
    plain_rope=False,
    complete=_derive,
    letters=_letters,
    adjust=_rebuild,
)  # fmt: skip

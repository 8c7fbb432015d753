"""Small real models as Hugging Face directories, made by transformers alone. Runs under the lab's base interpreter.

make_models.py unpack FILE.gguf OUT   transformers' own reading of a GGUF, saved in bfloat16
make_models.py pad SRC OUT            the same function with hidden size 768: every row a multiple of 256
make_models.py cut SRC OUT            the first four layers
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

WIDE, LAYERS = 768, 4


def _finish(model: Any, source: Path, out: Path, tokenizer: Any = None) -> None:
    """Save under a partial name, the tokenizer beside the weights, and rename when complete."""
    import torch
    from transformers import AutoTokenizer

    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    (tokenizer or AutoTokenizer.from_pretrained(source)).save_pretrained(partial)
    partial.rename(out)


def unpack(source: Path, out: Path) -> None:
    """GGUF -> Hugging Face directory, dequantized by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    _finish(model, source, out, tokenizer)


def pad(source: Path, out: Path) -> None:
    """Zero rows and columns up to ``WIDE``, heads in the same ratio; norm weights and eps scaled so that RMSNorm stays the same."""
    import torch
    from transformers import AutoModelForCausalLM

    narrow = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = narrow.config
    ratio = WIDE / config.hidden_size
    dim = config.hidden_size // config.num_attention_heads
    config.num_attention_heads, config.num_key_value_heads = WIDE // dim, round(config.num_key_value_heads * ratio)
    config.head_dim, config.hidden_size, config.rms_norm_eps = dim, WIDE, config.rms_norm_eps / ratio
    state = narrow.state_dict()
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    padded = {}
    for name, target in wide.state_dict().items():
        values = state[name] / ratio**0.5 if name.endswith("norm.weight") else state[name]
        padded[name] = torch.zeros_like(target)
        padded[name][tuple(slice(0, size) for size in values.shape)] = values
    wide.load_state_dict(padded)
    _finish(wide, source, out)


def cut(source: Path, out: Path) -> None:
    """Keep the first ``LAYERS`` layers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    _finish(model, source, out)


if __name__ == "__main__":
    verb, first, second = sys.argv[1:4]
    {"unpack": unpack, "pad": pad, "cut": cut}[verb](Path(first), Path(second))

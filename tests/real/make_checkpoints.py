"""Real GPTQ and AWQ checkpoints, each written by its format's own library: ``make_checkpoints.py NAME …`` or ``list``.

Runs under the lab's interpreter that has GPTQModel 7.7.0 and AutoAWQ 0.2.9. A name says it all: ``gptq-BITS-STYLE-gGROUP[-v2]-MODEL``
with style ``sym``, ``asym`` or ``act`` (symmetric with act-order), and ``awq-LAYOUT-gGROUP-MODEL`` with layout ``gemm`` or ``gemv``;
``gm1`` is one group a row. Models: ``slice`` (4 layers of SmolLM2-135M), ``wide`` (4 layers of the one padded to 768), ``whole``.
A checkpoint appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from lab import CHECKPOINTS, MODELS
from text import calibration_texts

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default asks for more workers than two cores have

BASES = {"slice": "smollm2-slice4", "wide": "smollm2-768-slice4", "whole": "smollm2-135m"}
REAL = ("gptq-4-sym-g64-slice", "awq-gemm-g64-slice", "gptq-4-act-g64-slice", "gptq-4-asym-gm1-wide")
FULL = (
    *(f"gptq-{bits}-{style}-g{group}-slice" for bits, group in ((2, 32), (3, 64), (8, 64)) for style in ("sym", "asym", "act")),
    "gptq-4-asym-g64-slice", "gptq-4-asym-g32-v2-slice", "gptq-4-sym-g128-wide", "gptq-4-sym-gm1-wide", "gptq-4-act-g128-wide",
    "gptq-8-sym-gm1-wide", "awq-gemm-g32-slice", "awq-gemv-g64-slice", "awq-gemm-g128-wide", "awq-gemv-g128-wide",
    "gptq-4-sym-g64-whole", "awq-gemm-g64-whole",
)  # fmt: skip
_GPTQ = re.compile(r"gptq-(?P<bits>\d)-(?P<style>sym|asym|act)-g(?P<group>\d+|m1)(?P<v2>-v2)?-(?P<base>\w+)")
_AWQ = re.compile(r"awq-(?P<layout>gemm|gemv)-g(?P<group>\d+)-(?P<base>\w+)")
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "generation_config.json")


def make(name: str) -> None:
    """Make one checkpoint under ``CHECKPOINTS``; whatever stood half-made under its partial name goes first."""
    out, partial = CHECKPOINTS / name, CHECKPOINTS / f".{name}.part"
    if out.exists():
        return
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    gptq, awq = _GPTQ.fullmatch(name), _AWQ.fullmatch(name)
    if gptq:
        base = MODELS / BASES[gptq["base"]]
        _gptq(base, partial, int(gptq["bits"]), gptq["style"], -1 if gptq["group"] == "m1" else int(gptq["group"]), bool(gptq["v2"]))
    elif awq:
        base = MODELS / BASES[awq["base"]]
        _awq(base, partial, awq["layout"], int(awq["group"]))
    else:
        raise SystemExit(f"no recipe makes {name!r}")
    for file in SIDE_FILES:
        if (base / file).exists() and not (partial / file).exists():
            shutil.copy(base / file, partial)
    partial.rename(out)


def _gptq(base: Path, out: Path, bits: int, style: str, group: int, v2: bool) -> None:
    """GPTQModel's own calibration (a few short passages) and its own writer."""
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoTokenizer

    act = style == "act"
    options: dict[str, Any] = {"format": "gptq_v2"} if v2 else {}
    config = QuantizeConfig(bits=bits, group_size=group, sym=style != "asym", desc_act=act, act_group_aware=False, **options)
    model = GPTQModel.load(str(base), config, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = [tokenizer(text) for text in calibration_texts(4)]
    model.quantize([{k: s[k] for k in ("input_ids", "attention_mask")} for s in samples], batch_size=1)
    model.save(str(out))


def _awq(base: Path, out: Path, layout: str, group: int) -> None:
    """Plain round-to-nearest scales through AutoAWQ's packers ``WQLinear_*.from_linear``; asymmetric, 4 bits."""
    import torch
    from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV  # type: ignore[import-not-found, unused-ignore]
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    kind = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV}[layout]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        grouped = linear.weight.data.float().reshape(linear.out_features, -1, group)  # (N, K/g, g)
        high, low = grouped.amax(2).clamp(min=0), grouped.amin(2).clamp(max=0)
        scale = ((high - low).clamp(min=1e-5) / 15).half().float()
        zero = (-torch.round(low / scale)).clamp(0, 15)
        codes = torch.clamp(torch.round(grouped / scale[..., None]) + zero[..., None], 0, 15)
        linear.weight.data = ((codes - zero[..., None]) * scale[..., None]).reshape(linear.weight.shape).half()
        if layout == "gemm":
            scale, zero = scale.t().contiguous(), zero.t().contiguous()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, kind.from_linear(linear, 4, group, False, scale, zero))
    out.mkdir(parents=True)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": layout, "modules_to_not_convert": None,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1, default=str))


def main(names: list[str]) -> None:
    """Make the named checkpoints; ``list`` prints all names, ``real`` and ``full`` stand for the tiers."""
    if names == ["list"]:
        print("\n".join((*REAL, *FULL)))
        return
    import torch

    torch.set_num_threads(2)
    for name in names:
        for one in {"real": REAL, "full": (*REAL, *FULL)}.get(name, (name,)):
            make(one)


if __name__ == "__main__":
    main(sys.argv[1:])

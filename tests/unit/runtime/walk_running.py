"""What every format can do once it is loaded: a checkpoint of each is loaded, run, saved, trained on, merged and compiled.

``docs/running.json`` holds what was found, the README's table is made of it, and ``python tests/unit/runtime/walk_running.py`` writes it
anew; the real suite walks again and compares.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "convert"), str(HERE.parents[2])]

import peft  # noqa: E402
import torch  # noqa: E402
from cases import MODELS  # noqa: E402
from checkpoints import converted, ready  # noqa: E402
from test_load import check_logits, logits  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from qformats import registry  # noqa: E402
from qformats.errors import QFormatError  # noqa: E402
from qformats.kernels import cpu  # noqa: E402
from qformats.runtime import take_over  # noqa: E402
from qformats.runtime.config import QFormatsConfig  # noqa: E402
from qformats.runtime.linear import QuantLinear  # noqa: E402
from qformats.runtime.loader import load_model  # noqa: E402
from qformats.runtime.packed import Packed  # noqa: E402

RUNNING = HERE.parents[2] / "docs" / "running.json"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
FORMATS = tuple(row.name for row in registry.ROWS if row.name != "hf")


def source_of(form: str, directory: Path) -> Path:
    """A model of the format: a fixture that its owner made, a GGUF of our own."""
    if form == "gguf":
        out = directory / "model.gguf"
        converted(ready("dense/llama", directory), out, "gguf:q4_k_m", allow_requantize=True)
        return out
    return ready(next(case for case in MODELS if case.partition("/")[0] == form), directory)


def found(form: str) -> dict[str, str]:
    """Column → what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        source = source_of(form, directory)
        model = load_model(source, dtype=torch.float32)
        assert any(isinstance(module, Packed) for module in model.modules())
        return {
            "load_model": "yes", "from_pretrained": _taken_over(source, logits(model, _ids(model))), "CPU": _cpu(form, source, directory),
            "GPU": _gpu(model), "saves": _saved(model, source, directory / "saved"), "torch.compile": _compiled(model),
            **_lora(model, directory / "merged"),
        }  # fmt: skip


def _ids(model: Any) -> torch.Tensor:
    return IDS % model.config.get_text_config().vocab_size


def _taken_over(source: Path, wanted: torch.Tensor) -> str:
    folder, options = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
    said = source.suffix == ".gguf" or "quantization" in (source / "config.json").read_text()
    config = {} if said else {"quantization_config": QFormatsConfig()}
    with take_over():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options, **config)
    assert torch.allclose(logits(model, _ids(model)), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    return "yes"


def _cpu(form: str, source: Path, directory: Path) -> str:
    if form != "gguf":
        check_logits(next(case for case in MODELS if case.partition("/")[0] == form), directory / "check")
    cpu._warn.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load_model(source, dtype=torch.float32, compute="int8")
        logits(model, _ids(model))
    return "exact" if any("product of bytes" in str(warning.message) for warning in said) else "exact, int8"


def _gpu(model: Any) -> str:
    from qformats.kernels.triton.spec import spec_of

    layouts = [layout for module in model.modules() if isinstance(module, Packed) for layout in module.layouts]
    return "kernels" if all(spec_of(layout) is not None for layout in layouts) else "plain torch"


def _saved(model: Any, source: Path, out: Path) -> str:
    model.save_pretrained(out)
    files = [source] if source.is_file() else [file for file in source.iterdir() if file.suffix != ".py"]
    return "same bytes" if all((out / file.name).read_bytes() == file.read_bytes() for file in files) else "other bytes"


def _compiled(model: Any) -> str:
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        made, wanted = compiled(input_ids=_ids(model), use_cache=False).logits, logits(model, _ids(model))
    assert torch.allclose(made, wanted, atol=1e-4 * float(wanted.abs().max()))
    return "whole graph"


def _lora(model: Any, out: Path) -> dict[str, str]:
    names = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)] or ["q_proj"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=1, target_modules=names, init_lora_weights=False))
    tuned.train()
    loss = tuned(input_ids=_ids(model), labels=_ids(model)).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for name, p in tuned.named_parameters() if "lora_" in name)
    try:
        with torch.no_grad():
            tuned.eval().merge_adapter()
        model.save_pretrained(out)
    except QFormatError as error:
        return {"LoRA": "trains", "merges": f"refused: {error.code}"}
    return {"LoRA": "trains", "merges": "new codes"}


def main() -> None:
    torch.set_num_threads(1)
    RUNNING.write_text(json.dumps({form: found(form) for form in FORMATS}, indent=1) + "\n")


if __name__ == "__main__":
    main()

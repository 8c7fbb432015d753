"""GPTQ of several widths: what GPTQModel itself resolves for every matrix, and for the layers that engines fuse, out of our rules."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lab import checkpoint_python, why_missing
from test_dense import tiny_model

from converters import convert
from converters.lint import lint_path

pytestmark = pytest.mark.real
ASK = """
import json, sys
from types import SimpleNamespace
from gptqmodel.quantization.config import dynamic_get
from gptqmodel.utils.model import fused_unit_dynamic_conflicts
config, names = json.loads(sys.argv[1]), json.loads(sys.argv[2])
known = SimpleNamespace(**{key: config[key] for key in ("bits", "group_size", "desc_act", "sym", "dynamic")})
known.dynamic_get = lambda name, **more: dynamic_get(known.dynamic, name, **more)
bits = {name: dynamic_get(known.dynamic, name, "bits", config["bits"]) for name in names}
print("FOUND" + json.dumps([bits, [found.unit for found in fused_unit_dynamic_conflicts(names, known)]]))
"""


def asked(config: dict[str, Any], names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """GPTQModel's bits of every module (False where it leaves it out) and the fused layers that it finds in conflict with their parts."""
    words = [str(checkpoint_python()), "-c", ASK, json.dumps(config), json.dumps(names)]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    bits, conflicts = json.loads(text.partition("FOUND")[2])
    return bits, conflicts


@pytest.mark.parametrize(
    ("pattern", "conflict"),
    [(r"layers\.0\.self_attn\.[qkv]_proj|layers\.1\.mlp\.experts", None), (r"layers\.0\.self_attn\.[qk]_proj", "self_attn.qkv_proj")],
)
def test_rules_reach_fused_layers(pattern: str, conflict: str | None, tmp_path: Path) -> None:
    """Experts and queries, keys and values as one; where parts disagree no rule can say it, and lint does."""
    if missing := why_missing("gptq", checkpoint_python()):
        pytest.skip(missing)
    floats = tiny_model("qwen3_moe", tmp_path / "floats")
    made = tmp_path / "made"
    report = convert(floats, made, to="gptq:int4,group=32", tensor_types=((pattern, "int8"),))
    types = {line.name.removesuffix(".weight"): line.type for line in report.tensors if line.type in ("int4", "int8")}
    assert set(types.values()) == {"int4", "int8"}
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    bits, conflicts = asked(config, list(types))
    assert bits == {name: int(kind[3:]) for name, kind in types.items()}
    assert conflicts == ([] if conflict is None else [f"model.layers.0.{conflict}"])
    (verdict,) = lint_path(made, ("vllm",)).verdicts
    found = {finding.rule for finding in verdict.findings}
    assert ("fused" in found) == (conflict is not None) and "fused-rules" not in found

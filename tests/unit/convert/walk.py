"""Every ordered pair of formats: a checkpoint of each type of each format, made by its own writer, planned into every format.

``docs/kinds.json`` holds what becomes of the linear weights: for each source type and target format the best kind and its type where none
is named. ``python tests/unit/convert/walk.py`` writes it anew; a change of it is a change of what users get, to be read before it is
committed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3])]

from checkpoints import FIXTURES, Tensors, header, load, planned, ready, store, stripped_gguf  # noqa: E402

from converters.execute import execute  # noqa: E402
from converters.plan import Plan  # noqa: E402
from qformats import registry  # noqa: E402
from qformats.errors import QFormatError  # noqa: E402

KINDS = Path(__file__).parents[3] / "docs" / "kinds.json"
GGUF = ("q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q6_k", "iq4_nl", "mxfp4", "nvfp4", "tq2_0", "f16")
LINEAR = ("linear", "experts")
ASKS = "needs --allow-requantize or a named type"
HIDDEN, INNER, HEADS, KV = 256, 512, 4, 2
TARGETS = tuple(row.name for row in registry.ROWS if row.writes)


def sources() -> list[str]:
    """``FORMAT:TYPE`` of every type that can be made from floats, ``FORMAT`` where the format only keeps what it has."""
    found = []
    for row in registry.ROWS:
        types = GGUF if row.container == "gguf" else row.types
        found += [f"{row.name}:{kind}" for kind in types] or [row.name]
    return found


def dense(directory: Path, hidden: int = HIDDEN, inner: int = INNER, head: int = HIDDEN // HEADS) -> Path:
    """A llama of one layer in bfloat16 with rows that every block divides; once made, of whatever size."""
    out = directory / "dense"
    if out.exists():
        return out
    shutil.copytree(ready("dense/llama", directory), out)
    config = json.loads((out / "config.json").read_text())
    config.update(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=KV,
                  head_dim=head)  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn.q_proj": (HEADS * head, hidden), "self_attn.k_proj": (KV * head, hidden), "self_attn.v_proj": (KV * head, hidden),
              "self_attn.o_proj": (hidden, HEADS * head), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}  # fmt: skip
    names = {f"model.layers.0.{leaf}.weight": shape for leaf, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (config["vocab_size"], hidden), "lm_head.weight": (config["vocab_size"], hidden)}
    names |= {f"model.{leaf}.weight": (hidden,) for leaf in ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm")}
    rng, tensors = np.random.default_rng(0), Tensors()
    for name, shape in names.items():
        values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.02
        bits = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
        tensors[name] = ("BF16", list(shape), bits.tobytes())
    store(out / "model.safetensors", tensors, {"format": "pt"})
    return out


def make(name: str, directory: Path) -> Path:
    """The checkpoint ``FORMAT:TYPE`` without the record of where it came from; a fixture where the format cannot make one."""
    kept = directory / name.replace(":", "-")
    out = kept.with_suffix(".gguf") if name.startswith("gguf") else kept
    if out.exists():
        return out
    if ":" not in name:
        first = min(path.parent for path in (FIXTURES / name).rglob("config.json"))
        return ready(str(first.relative_to(FIXTURES)), directory)
    made = directory / f"recorded-{out.name}"
    plan = planned(dense(directory), name, allow_requantize=True)
    with plan.checkpoint:
        execute(plan, made, workers=2)
    return stripped(made, out)


def stripped(made: Path, out: Path) -> Path:
    """``made`` as a stranger would have written it."""
    if made.is_dir():
        shutil.copytree(made, out)
        for file in out.glob("*.safetensors"):
            store(file, load(file), {k: v for k, v in header(file)["__metadata__"].items() if not k.startswith("qformats")})
        return out
    return stripped_gguf(made, out)


def summary(plan: Plan, kinds: tuple[str, ...] = LINEAR) -> str:
    """Kind and type of the matrices of these kinds, with a mark where consent is needed."""
    matrices = [j for j in plan.jobs if j.map.leaf == "weight" and len(j.map.shape) > 1 and j.map.kind in kinds]
    counts = Counter(f"{job.kind} {job.type}" for job in matrices)
    asks = ", asks" if any(ASKS in job.notes for job in plan.jobs) else ""
    return ", ".join(sorted(counts)) + asks


def outcome(source: Path, target: str, kinds: tuple[str, ...] = LINEAR) -> str:
    try:
        plan = planned(source, target)
    except QFormatError as error:
        return f"refused: {error.code}"
    plan.checkpoint.close()
    return summary(plan, kinds)


def row_of(name: str, directory: Path) -> dict[str, str]:
    """What becomes of one source in every format."""
    try:
        source = make(name, directory)
    except QFormatError as error:
        return {"": f"cannot be made: {error.code}"}
    return {target: outcome(source, target) for target in TARGETS}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = {name: row_of(name, Path(folder)) for name in sources()}
    KINDS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    assert FIXTURES.exists()
    main()

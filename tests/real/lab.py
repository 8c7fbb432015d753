"""Where the real components lie: one folder outside the repository with other people's software, models and checkpoints.

``QFORMATS_LAB`` (default ``~/.cache/qformats-lab``) holds::

    venv/            torch, transformers, other formats' owners   venv-gptq/   GPTQModel and AutoAWQ on top of venv
    llamacpp/        llama.cpp v0.5.0 as shared libraries         so/          unpacked npm packages, llama.cpp's source
    models/gguf/     SmolLM2 and Gemma 3 as published GGUF files  models/*/    the same as Hugging Face directories, padded and cut
    checkpoints/     checkpoints made by their formats' own libraries (``make_checkpoints.py``, ``make_owner_checkpoints.py``)
    failed/          why a stage could not be installed: the reason that skipped tests show

Standard library only; nothing here imports the package under test.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "CHECKPOINTS", "GEMMA_GGUF", "LAB", "MODELS", "SMOLLM_GGUF", "checkpoint_python", "floats_of", "log_tail", "owners_python",
    "why_missing",
]  # fmt: skip

LAB = Path(os.environ.get("QFORMATS_LAB", "~/.cache/qformats-lab")).expanduser()
MODELS = LAB / "models"
CHECKPOINTS = LAB / "checkpoints"
SMOLLM_GGUF = MODELS / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA_GGUF = MODELS / "gguf" / "gemma-3-270m.Q4_K_M.gguf"


def checkpoint_python() -> Path:
    """The interpreter that has GPTQModel and AutoAWQ."""
    return LAB / "venv-gptq" / "bin" / "python"


def owners_python() -> Path:
    """The interpreter that has bitsandbytes, hqq, optimum-quanto, torchao and compressed-tensors."""
    return LAB / "venv" / "bin" / "python"


def floats_of(checkpoint: Path) -> Path:
    """Where the owner's own float32 values of a checkpoint stand, as a plain directory."""
    return checkpoint.with_name(f"{checkpoint.name}.floats")


def log_tail(path: Path) -> str:
    """The last line that says something, for a skip's reason."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    return lines[-1][:300] if lines else ""


def why_missing(stage: str, path: Path) -> str | None:
    """None if ``path`` is there, else why it is not: the recorded failure of its stage, or that nobody installed it."""
    if path.exists():
        return None
    reason = log_tail(LAB / "failed" / stage)
    return f"{stage} could not be installed: {reason}" if reason else f"{stage} is not installed (python tests/real/setup_lab.py {stage})"

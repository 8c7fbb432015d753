"""Fixture checkpoints and the gallery of canonical tensors are shared with the other unit tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "convert")]

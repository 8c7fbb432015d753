"""The fixtures that are whole models; the unit tests take one of each kind, the real suite all of them."""

from __future__ import annotations

import json

from checkpoints import ALL, FIXTURES

MODELS = [case for case in ALL if "model_type" in json.loads((FIXTURES / case / "config.json").read_text())]
SAMPLE = MODELS[::4]

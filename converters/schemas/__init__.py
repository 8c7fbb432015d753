"""JSON Schemas (2020-12) of what commands print with ``--json``, one file a kind of document; failures are ``error``."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

__all__ = ["schema", "schema_name"]

_SHARED = {
    **dict.fromkeys(("split", "merge", "edit"), "files"),
    **dict.fromkeys(("convert", "quantize", "dequantize"), "report"),
    **dict.fromkeys(("lora-to-gguf", "gguf-to-lora"), "lora"),
}


def schema_name(command: str) -> str:
    """Which document a command prints.

    >>> schema_name("inspect"), schema_name("awq-to-gguf")
    ('inspect', 'report')
    """
    return _SHARED.get(command) or ("report" if "-to-" in command else command)


def schema(name: str) -> dict[str, Any]:
    """The schema ``name``; ``FileNotFoundError`` if there is none."""
    found: dict[str, Any] = json.loads(resources.files(__package__).joinpath(f"{name}.schema.json").read_text(encoding="utf-8"))
    return found

"""Small files that are missing, copied from another checkpoint of the same model (``--like``): tokenizer, templates, settings."""

from __future__ import annotations

import json
from typing import Any

from converters.lint.facts import TEMPLATES, TOKENIZERS
from converters.lint.reading import Found
from converters.repair.mending import Mending, json_bytes
from qformats import registry
from qformats.checkpoint import SIDE_FILES

__all__ = ["mend_sides"]

_OWN = ("config.json", "modules.json", "1_Pooling/config.json", *(name for row in registry.ROWS for name in row.configs))
_KEPT = ("architectures", "model_type", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


def mend_sides(mending: Mending, like: Found) -> None:
    """Copy what is missing; nothing that is there is replaced."""
    there = mending.found.names
    wanted = [name for name in SIDE_FILES if name not in _OWN and name not in there and name in like.names]
    if any(name in there for name in TOKENIZERS):  # a tokenizer is one thing: parts of another one would not fit
        wanted = [name for name in wanted if name not in (*TOKENIZERS, "merges.txt", "added_tokens.json", "special_tokens_map.json")]
    if _has_template(mending.found):
        wanted = [name for name in wanted if name not in TEMPLATES]
    assert like.directory is not None or not wanted
    for name in wanted:
        assert like.directory is not None
        mending.small[name] = (like.directory / name).read_bytes()
    if wanted:
        mending.mend("side-files", f"{', '.join(wanted)} copied", f"missing here, there in {like.path}", tuple(wanted))
    _mend_template(mending, like)
    _mend_names(mending, like)


def _has_template(found: Found) -> bool:
    return bool(found.json("tokenizer_config.json").get("chat_template")) or any(name in found.names for name in TEMPLATES)


def _mend_template(mending: Mending, like: Found) -> None:
    """A chat template that is inside the other's tokenizer_config.json becomes a file of its own."""
    template = like.json("tokenizer_config.json").get("chat_template")
    copied = any(name in mending.small for name in (*TEMPLATES, "tokenizer_config.json"))
    if isinstance(template, str) and template and not copied and not _has_template(mending.found):
        mending.small["chat_template.jinja"] = template.encode()
        mending.mend("chat-template", "chat_template.jinja written", f"there is no chat template here, there is one in {like.path}")


def _mend_names(mending: Mending, like: Found) -> None:
    """Fields of config.json that say what model it is, where they are missing."""
    other = like.json("config.json")
    if not other:
        return
    missing: dict[str, Any] = {key: other[key] for key in _KEPT if mending.config.get(key) is None and other.get(key) is not None}
    if missing and mending.config:
        mending.config.update(missing)
        mending.small["config.json"] = json_bytes(mending.config)
        mending.mend("config-names", f"{', '.join(missing)} copied into config.json", f"missing here, there in {like.path}", tuple(missing))
    elif not mending.config and other.get("quantization_config") is None:
        mending.config.update(json.loads(json.dumps(other)))
        mending.small["config.json"] = json_bytes(mending.config)
        mending.mend("config", "config.json copied", f"missing here, there in {like.path}")

"""Special tokens, begin and end flags, merges and chat templates out of a checkpoint's side files, as llama.cpp's converter reads them.

Facts: llama.cpp, ``gguf-py/gguf/vocab.py`` ``SpecialVocab`` and ``gguf_writer.py`` ``add_chat_template``.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qformats.architectures.fields import text_config
from qformats.architectures.metadata import json_file
from qformats.errors import BadFile

if TYPE_CHECKING:
    from qformats.containers.gguf import Metadata

__all__ = ["KEYS", "Special", "merges_as_text", "read_special", "token_content"]

# the word in tokenizer_config.json → the word in the GGUF key (``seperator`` is how GGUF spells it)
KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask", "eot": "eot", "eom": "eom"}
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("bos", "eos", "sep")
_SAFE = frozenset(string.ascii_letters + string.digits)


@dataclass
class Special:
    """``ids`` and ``flags`` in the order found; ``templates``: text, or a list of named texts."""

    ids: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    templates: str | list[Any] | None = None

    def metadata(self) -> Metadata:
        from qformats.containers.gguf import Value

        made: Metadata = {f"tokenizer.ggml.{KEYS[n]}_token_id": Value("u32", i) for n, i in self.ids.items() if n in KEYS}
        made.update({f"tokenizer.ggml.add_{n}_token": Value("bool", v) for n, v in self.flags.items() if n in _FLAGS})
        made.update(_template_keys(self.templates))
        return made


def _template_keys(templates: str | list[Any] | None) -> Metadata:
    from qformats.containers.gguf import Value

    if templates is None or isinstance(templates, str):
        return {} if templates is None else {"tokenizer.chat_template": Value("str", templates)}
    made: Metadata = {}
    default: str | None = None
    for choice in templates:
        name, text = (choice.get("name", ""), choice.get("template")) if isinstance(choice, Mapping) else ("", None)
        name = "".join(c if c in _SAFE else "_" for c in str(name))
        if not name or not isinstance(text, str):
            continue
        if name == "default":
            default = text
        else:
            made[f"tokenizer.chat_template.{name}"] = Value("str", text)
    names = [key.removeprefix("tokenizer.chat_template.") for key in made]
    if names:
        made["tokenizer.chat_templates"] = Value("[str]", names)
    if default is not None:
        made["tokenizer.chat_template"] = Value("str", default)
    return made


def token_content(entry: Any) -> str | None:
    """The text of a special-token entry, which is a string or an object with ``content``."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def merges_as_text(merges: Any) -> list[str]:
    """Merges as ``"left right"``; in pairs, a space inside a part is written as its byte-level letter U+0120."""
    if not isinstance(merges, list):
        raise BadFile("tokenizer", "tokenizer.json has no list of merges", path="tokenizer.json")
    made: list[str] = []
    for merge in merges:
        if isinstance(merge, str):
            made.append(merge)
        elif isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
            made.append(" ".join(part.replace(" ", "Ġ") for part in merge))
        else:
            raise BadFile("tokenizer", f"tokenizer.json has a merge that is no pair of texts: {merge!r}", path="tokenizer.json")
    return made


def read_special(files: Mapping[str, bytes], config: Mapping[str, Any], limit: int | None) -> Special:
    """Collect special ids (below ``limit``), flags and chat templates from the side files and the config."""
    special = Special()
    tokenizer = json_file(files, "tokenizer.json")
    settings = json_file(files, "tokenizer_config.json")
    names = list(_NAMES)
    if tokenizer is not None:
        settings = _from_post_processor(special, tokenizer, settings, names)
    if settings is not None:
        special.templates = _templates(files, settings)
        added = tokenizer.get("added_tokens") if tokenizer else None
        listed = [t for t in added if isinstance(t, Mapping)] if isinstance(added, list) else []
        by_text = {token_content(t): t.get("id") for t in reversed(listed)}
        for name in names:
            if isinstance(flag := settings.get(f"add_{name}_token"), bool):
                special.flags[name] = flag
            if (content := token_content(settings.get(f"{name}_token"))) is not None:
                _set(special, name, by_text.get(content), limit)
    inner = text_config(config)
    for name in names:
        _set(special, name, config.get(f"{name}_token_id", inner.get(f"{name}_token_id")), limit)
    return special


def _set(special: Special, name: str, number: Any, limit: int | None) -> None:
    if isinstance(number, int) and not isinstance(number, bool) and number >= 0 and (limit is None or number < limit):
        special.ids.setdefault(name, number)


def _templates(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str | list[Any] | None:
    """tokenizer_config.json's own template, else chat_template.jinja (with its named neighbours), else chat_template.json."""
    found: Any = None
    if "chat_template.jinja" in files:
        found = _text(files, "chat_template.jinja")
        folder = "additional_chat_templates/"
        others = sorted(name for name in files if name.startswith(folder) and name.endswith(".jinja"))
        if others:
            found = [{"name": "default", "template": found}]
            found += [{"name": name[len(folder) : -len(".jinja")], "template": _text(files, name)} for name in others]
    elif (stored := json_file(files, "chat_template.json")) is not None:
        found = stored.get("chat_template")
    found = settings.get("chat_template", found)
    return found if isinstance(found, (str, list)) else None


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise BadFile("utf8", "is not UTF-8 text", path=name) from None


def _from_post_processor(
    special: Special, tokenizer: Mapping[str, Any], settings: dict[str, Any] | None, names: list[str]
) -> dict[str, Any] | None:
    """Read from a template post-processor whether a begin or an end token is added, and which when the settings do not say."""
    known = dict(settings or {})
    text: dict[str, str | None] = {name: token_content(known.get(f"{name}_token")) for name in ("bos", "eos", "cls", "sep")}
    for name, spare in (("bos", "cls"), ("eos", "sep")):
        if not text[name] and text[spare] and settings is not None:
            known[f"{name}_token"] = text[name] = text[spare]
    section = tokenizer.get("post_processor")
    parts = section.get("processors", [section]) if isinstance(section, Mapping) else []
    for part in parts if isinstance(parts, list) else []:
        single = part.get("single") if isinstance(part, Mapping) and part.get("type") == "TemplateProcessing" else None
        if not isinstance(single, list) or len(single) < 2:
            continue
        if (first := _template_token(single[0])) is not None:
            if settings is None or not text["bos"]:
                known["bos_token"] = text["bos"] = first
            special.flags["bos"] = first in (text["bos"], text["cls"])
        if (last := _template_token(single[-1])) is not None:
            if settings is not None and last != text["eos"]:
                spare = "eot" if "eot" not in names else "eom"
                names.append(spare)
                known[f"{spare}_token"] = text["eos"]
            known["eos_token"] = text["eos"] = last
            special.flags["eos"] = True
        separated = _pair_has_separator(part.get("pair"), first, last, (text["sep"], text["eos"]))
        if separated is not None:
            special.flags["sep"] = separated
            if separated and not text["sep"]:
                known["sep_token"] = text["eos"]
    return None if settings is None else known


def _pair_has_separator(pair: Any, first: str | None, last: str | None, separators: tuple[str | None, ...]) -> bool | None:
    """Whether a pair template puts a separator between its two texts; None where nothing stands between them."""
    if not isinstance(pair, list) or not pair:
        return None
    inner = pair[1 if first is not None and _template_token(pair[0]) == first else 0 :]
    if inner and last is not None and _template_token(inner[-1]) == last:
        inner = inner[:-1]
    if len(inner) < 3 or not all(isinstance(end, Mapping) and "Sequence" in end for end in (inner[0], inner[-1])):
        return None
    middle = [_template_token(entry) for entry in inner[1:-1]]
    return (middle[0] in separators and last is None) or (len(middle) == 2 and middle[1] is not None and middle[1] in separators)


def _template_token(entry: Any) -> str | None:
    token = entry.get("SpecialToken") if isinstance(entry, Mapping) else None
    name = token.get("id") if isinstance(token, Mapping) else None
    return name if isinstance(name, str) else None

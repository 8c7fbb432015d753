"""The model card: metadata that says what the files were made from, and one section of ours between two markers.

What stands outside the markers is never touched; a file pushed earlier keeps its line as long as the repository has it. The lines are
kept as JSON in a comment inside the section, so that a later push can write the whole table again.

How other programs name what they run: llama.cpp ``-hf ORG/NAME[:TAG]`` and ``--hf-file`` (v0.5.0, ``common/arg.cpp``, which file a tag
chooses: ``find_best_model`` in ``common/download.cpp``); Ollama ``hf.co/ORG/NAME[:TAG]``, where the tag may be a file's whole name (the
Hub's documentation, "Use Ollama with any GGUF Model on Hugging Face Hub"; no shards); vLLM ``vllm serve ORG/NAME --revision`` (its
documentation, "Engine Arguments"). The first two take no revision.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qformats.errors import RemoteError
from qformats.hub import client

__all__ = ["BEGIN", "END", "About", "Entry", "entries_of", "written"]

BEGIN, END = "<!-- qformats:begin -->", "<!-- qformats:end -->"
_SECTION = re.compile(f"{BEGIN}((?:(?!{BEGIN}).)*?){END}", re.DOTALL)  # a begin whose end somebody removed encloses nothing
_LINES = re.compile(r"<!-- qformats:files (.*?) -->", re.DOTALL)
_KINDS = {
    "copied": "the same bytes",
    "exact": "the same real numbers",
    "codes-exact": "every code kept, a scale or offset rounded",
    "dequantized": "floats instead of codes",
    "requantized": "new codes",
}
_VLLM = ("awq", "gptq", "compressed-tensors", "fp8", "bitsandbytes", "modelopt", "mxfp4", "fbgemm_fp8", "torchao", "hf")
_NO_METADATA = "---\n{}\n---\n"
_EMPTY_METADATA = re.compile(r"\s*---[ \t]*\r?\n---[ \t]*(?:\r?\n|$)")
_METADATA = re.compile(r"(\s*---[ \t]*\r?\n)(.*?)((?:\r?\n)---[ \t]*(?:\r?\n|$))", re.DOTALL)
_KEY = re.compile(r"""(["']?)([^\s"'#:-][^"':]*)\1[ \t]*:""")
_COPIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True)
class Entry:
    """A model as it is offered: one GGUF (all shards under the first one's name) or the safetensors of the repository (``name`` empty).

    ``type``: what llama.cpp or the format's users call it. ``kinds``: tensors by kind of the conversion, empty where nobody knows.
    ``error``: the largest relative rms error that was measured. ``shards``: number of files.
    """

    name: str
    format: str
    type: str
    nbytes: int
    shards: int = 1
    source: str = ""
    kinds: Mapping[str, int] = field(default_factory=dict)
    error: float | None = None
    tool: str = ""

    @property
    def lossless(self) -> bool | None:
        """Whether every tensor stands for the source's real numbers; None where nobody knows."""
        return set(self.kinds) <= {"copied", "exact"} if self.kinds else None


@dataclass(frozen=True)
class About:
    """What the metadata takes over: ``base`` is the repository the model was made from, ``inherited`` its card's metadata."""

    repo: str
    tool: str
    base: str | None = None
    inherited: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None


def entries_of(text: str) -> list[Entry]:
    """The lines of an earlier push in a card; none where there are none or they cannot be read."""
    section = _SECTION.search(text)
    found = _LINES.findall(section[1] if section else text)
    try:
        items = json.loads(found[-1]) if found else []
        return [Entry(**item) for item in items if isinstance(item.get("name"), str) and isinstance(item.get("nbytes"), int)]
    except (ValueError, TypeError, AttributeError):
        return []


def written(existing: str | None, about: About, entries: Sequence[Entry]) -> str:
    """The card with its metadata and our section renewed; ``existing`` is what the repository or the directory has.

    Raises ``RemoteError('hub-card')`` for metadata that cannot be read: it is not thrown away.
    """
    package = client.package()
    title = about.repo.rpartition("/")[2]
    start = existing if existing is not None else f"\n# {title}\n"
    start = _EMPTY_METADATA.sub("", start, count=1) if _EMPTY_METADATA.match(start) else start
    try:
        card = package.ModelCard(start if start.lstrip().startswith("---") else f"{_NO_METADATA}{start}")
    except Exception as error:
        hint = "mend the lines between the two --- of README.md in the repository"
        raise RemoteError("hub-card", f"the model card's metadata cannot be read: {error}", path=about.repo, hint=hint) from None
    before = card.data.to_dict()
    _set_metadata(card.data, about, entries)
    section = f"{BEGIN}\n{''.join(f'{line}' + chr(10) for line in _section(about, entries))}{END}"
    body: str = card.text
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: section, body, count=1)
    else:
        body = body.rstrip("\n") + f"\n\n{section}\n"
    head = _renewed(start[: len(start) - len(card.text)], before, card.data.to_dict()) if start.endswith(card.text) else None
    if head is not None:
        return head + body
    card.text = body
    return str(card)


def _renewed(head: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The metadata with the keys that changed at its end and all other lines as they are; None where only a rewriting says the same."""
    block = _METADATA.fullmatch(head)
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    if block is None or not changed:
        return head if block is not None else None
    package = client.package()
    kept, drops = [], False
    for line in block[2].splitlines():
        key = _KEY.match(line)
        drops = key[2].strip() in changed if key else drops and not line.startswith("#")
        kept += [] if drops else [line]
    added = package.repocard_data.yaml_dump(changed, sort_keys=False).splitlines()
    end = "\r\n" if block[1].endswith("\r\n") else "\n"
    text = block[1] + end.join([*kept, *added]) + block[3]
    try:
        same = package.ModelCard(text).data.to_dict() == dict(after)
    except Exception:
        return None  # whatever is unusual about it, rewriting it keeps what it says
    return text if same else None


def _set_metadata(data: Any, about: About, entries: Sequence[Entry]) -> None:
    if about.base is not None and not data.get("base_model"):
        data["base_model"] = about.base
    if data.get("base_model") and not data.get("base_model_relation"):
        data["base_model_relation"] = "quantized"
    for key in _COPIED:
        if not data.get(key) and about.inherited.get(key):
            data[key] = about.inherited[key]
    formats = list(dict.fromkeys(entry.format for entry in entries if entry.format != "hf"))
    tags = data.get("tags") or []
    data["tags"] = [*tags, *(tag for tag in ("qformats", *formats) if tag not in tags)]
    if not data.get("library_name"):
        data["library_name"] = "gguf" if formats == ["gguf"] else "transformers"


# ---------------------------------------------------------------- the section


def _section(about: About, entries: Sequence[Entry]) -> Iterator[str]:
    kept = json.dumps([_plain(entry) for entry in entries], separators=(",", ":"), ensure_ascii=True)
    yield f"<!-- qformats:files {kept.replace('>', chr(92) + 'u003e')} -->"
    yield "## Files"
    yield ""
    yield "| file | format | type | size | against its source |"
    yield "|---|---|---|---:|---|"
    for entry in entries:
        name = f"`{_md(entry.name)}`" if entry.name else "safetensors"
        shards = f" and {entry.shards - 1} more" if entry.shards > 1 and entry.name else ""
        yield f"| {name}{shards} | {_md(entry.format)} | {_md(entry.type)} | {_size(entry.nbytes)} | {_verdict(entry)} |"
    yield ""
    yield f"Made with {_md(about.tool)}{f' from [{about.base}](https://huggingface.co/{about.base})' if about.base else ''}."
    yield ""
    yield "### What is exact"
    yield ""
    yield from _exactness(entries)
    yield ""
    yield "### Run"
    yield ""
    yield from _snippets(about, entries)


def _plain(entry: Entry) -> dict[str, Any]:
    always = ("name", "nbytes", "format", "type")
    return {key: value for key, value in asdict(entry).items() if value not in ("", None, {}, 1) or key in always}


def _md(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _size(nbytes: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while nbytes >= 999.5 and len(units) > 1:
        nbytes /= 1000
        units.pop(0)
    return f"{nbytes:.3g} {units[0]}"


def _verdict(entry: Entry) -> str:
    if entry.lossless is None:
        return "not recorded"
    if entry.lossless:
        return "exact"
    return ", ".join(f"{count} {kind}" for kind, count in entry.kinds.items())


def _exactness(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        name = f"`{_md(entry.name)}`" if entry.name else "The safetensors files"
        if not entry.kinds:
            yield f"- {name}: what became of each tensor was not recorded here; `qconvert verify SOURCE FILE` tells."
            continue
        source = f" ({_md(entry.source)} source)" if entry.source else ""
        words = "; ".join(f"{count} tensors {kind}: {_KINDS.get(kind, 'see the report')}" for kind, count in entry.kinds.items())
        error = "" if entry.error is None else f"; largest relative rms error of a tensor {entry.error:.3g}"
        yield f"- {name}{source}: {_md(words)}{error}."


def _snippets(about: About, entries: Sequence[Entry]) -> Iterator[str]:
    gguf = [entry for entry in entries if entry.format == "gguf"]
    others = [entry for entry in entries if entry.format != "gguf"]
    at = f"@{about.revision}" if about.revision else ""
    name = re.sub(r"[^\w./@+-]", "_", gguf[0].name) if gguf else ""
    first = f'"hf://{about.repo}{at}/{name}"' if gguf and not others else f'"hf://{about.repo}{at}"'
    yield "Transformers, on the packed weights (`pip install qformats`):"
    yield ""
    calls = (f"model = qformats.load_model({first})", f"tokenizer = qformats.load_tokenizer({first})")
    yield from _code("python", "import qformats", "", *calls)
    if gguf:
        tag = _tag(gguf[0], gguf)
        yield "llama.cpp:"
        yield ""
        if about.revision:
            pattern = re.sub(r"-00001-of-(\d{5}\.gguf)$", r"-*-of-\1", name)
            yield from _code("sh", f"qconvert pull {about.repo}{at} . --include '{pattern}'", f"llama-cli -m {name}")
        else:
            yield from _code("sh", f"llama-cli -hf {about.repo}{f':{tag}' if tag else f' --hf-file {name}'}")
        if not about.revision and gguf[0].shards == 1:
            yield "Ollama:"
            yield ""
            yield from _code("sh", f"ollama run hf.co/{about.repo}:{tag or name}")
    if any(entry.format in _VLLM for entry in others):
        yield "vLLM:"
        yield ""
        revision = f" --revision {about.revision}" if about.revision else ""
        yield from _code("sh", f"vllm serve {about.repo}{revision}")


def _tag(entry: Entry, others: Sequence[Entry]) -> str:
    """The end of the file's name, if llama.cpp chooses this file by it; empty if only the whole name does."""
    found = re.search(r"[-.]([A-Za-z0-9_]+)(-\d{5}-of-\d{5})?\.gguf$", entry.name)
    if found is None:
        return ""
    names = sorted(other.name for other in others)
    first = next(name for name in names if re.search(rf"{found[1]}[.-]", name, re.IGNORECASE))
    return found[1] if first == entry.name else ""


def _code(language: str, *lines: str) -> Iterable[str]:
    return (f"```{language}", *lines, "```", "")

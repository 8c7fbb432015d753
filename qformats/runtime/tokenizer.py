"""``load_tokenizer``: the tokenizer of any checkpoint as transformers' own, that of a GGUF built from its metadata."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from qformats.architectures.hf_tokenizer import has_vocabulary, no_collection, tokenizer_parts
from qformats.checkpoint import fetched_beside, open_checkpoint
from qformats.errors import BadFile, Unsupported
from qformats.runtime import skeleton

__all__ = ["adds_bos", "load_tokenizer"]

_BPE_OPTIONS = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges",
)  # fmt: skip
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer at ``path``: a directory, a file in one, or a .gguf; of an address what it needs is fetched, without the weights.

    Raises ``BadFile('tokenizer')`` where the files are not there or transformers cannot read them.
    """
    package = skeleton.transformers()
    found = fetched_beside(path, _FILES)
    source = Path(found)
    beside = found is not path
    if beside or (source.is_dir() and any((source / name).is_file() for name in _FILES) and not any(source.glob("*.gguf"))):
        return _load(package, source, source)  # whatever its weights are
    with open_checkpoint(found) as checkpoint:
        if checkpoint.gguf is None:
            directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
            return _load(package, directory, checkpoint.path)
        metadata = checkpoint.gguf.metadata
        if not has_vocabulary(metadata):
            raise Unsupported("tokenizer", "holds no vocabulary", path=checkpoint.path, hint="use the tokenizer of the original model")
        parsed, files = tokenizer_parts(metadata)
        files["config.json"] = checkpoint.binding.hf_configs(metadata)["config.json"]
        with no_collection(), tempfile.TemporaryDirectory(prefix="qformats-tokenizer-") as folder:
            return _from_parts(package, parsed, files, Path(folder), checkpoint.path)


def _from_parts(package: Any, parsed: dict[str, Any], files: dict[str, bytes], folder: Path, shown: Path) -> Any:
    """Written and loaded as files, but for the merges, of which there are many: they are put in as they are."""
    model = parsed["model"]
    apart = model.get("type") == "BPE" and bool(model["merges"])
    short = {**parsed, "model": {**model, "merges": []}} if apart else parsed
    files["tokenizer.json"] = json.dumps(short, ensure_ascii=False).encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    made = _load(package, folder, shown)
    if apart:
        from tokenizers.models import BPE

        held = made.backend_tokenizer.model  # some of transformers' classes have settings of their own
        options = {key: value for key in _BPE_OPTIONS if (value := getattr(held, key)) is not None}
        made.backend_tokenizer.model = BPE(model["vocab"], model["merges"], **options)
    return made


def adds_bos(tokenizer: Any) -> bool:
    """Whether a text's tokens begin with BOS."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a").input_ids)[:1] == [bos]


def _load(package: Any, directory: Path, shown: Path) -> Any:
    try:
        return package.AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:  # whatever transformers meets in files that are not to its liking
        message = f"transformers cannot read the tokenizer: {type(error).__name__}: {error}"
        raise BadFile("tokenizer", message, path=shown, hint="add tokenizer.json and tokenizer_config.json") from error

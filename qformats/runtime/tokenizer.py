"""``load_tokenizer``: the tokenizer of any checkpoint as transformers' own, that of a GGUF built from its metadata."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from qformats.checkpoint import fetched, open_checkpoint
from qformats.errors import BadFile, Unsupported
from qformats.runtime import skeleton

__all__ = ["adds_bos", "load_tokenizer"]


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer at ``path``: a directory, a file in one, or a .gguf.

    Raises ``BadFile('tokenizer')`` where the files are not there or transformers cannot read them.
    """
    package = skeleton.transformers()
    with open_checkpoint(fetched(path)) as checkpoint:
        if checkpoint.gguf is None:
            directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
            return _load(package, directory, checkpoint.path)
        files = checkpoint.binding.hf_files(checkpoint.gguf.metadata)
        if not any(name.startswith("tokenizer") for name in files):
            raise Unsupported("tokenizer", "holds no vocabulary", path=checkpoint.path, hint="use the tokenizer of the original model")
        with tempfile.TemporaryDirectory(prefix="qformats-tokenizer-") as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            return _load(package, Path(folder), checkpoint.path)


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

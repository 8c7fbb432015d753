"""Addresses of repositories and of files in them: ``hf://org/name[@revision][/file]``. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qformats.errors import UsageError

__all__ = ["Address", "find_address", "is_address", "parse_address", "parse_repo"]

_SCHEME = re.compile(r"hf:/+")  # pathlib makes one slash of two
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"  # as huggingface_hub's validators have it
_REPO = re.compile(rf"{_NAME}/{_NAME}")
_MAX_REVISION = 200


@dataclass(frozen=True)
class Address:
    """A repository, a branch, tag or commit of it (None: its default branch) and a file in it (None: all)."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}{f'@{self.revision}' if self.revision else ''}{f'/{self.file}' if self.file else ''}"


def is_address(path: object) -> bool:
    """Whether ``path``, a string or a ``Path`` made of one, begins with ``hf://``."""
    return _SCHEME.match(_text(path)) is not None


def _text(path: object) -> str:
    return path.as_posix() if isinstance(path, Path) else str(path)


def parse_address(path: object) -> Address:
    """The address that ``path`` spells, with or without ``hf://``; ``UsageError('hub-address')`` for anything else.

    A revision that holds a slash is written with ``%2F``, as the hub's own addresses have it.

    >>> parse_address("hf://org/name@v1.0/model.gguf")
    Address(repo='org/name', revision='v1.0', file='model.gguf')
    """
    from urllib.parse import unquote

    words = _SCHEME.sub("", _text(path), count=1).rstrip("/").split("/")
    name, at, revision = words[1].partition("@") if len(words) > 1 else ("", "", "")
    repo, file = f"{words[0]}/{name}", "/".join(words[2:]) or None
    revision = unquote(revision)
    plain = file is None or not any(word in ("", ".", "..") or "\\" in word or "\0" in word for word in file.split("/"))
    known = not at or (0 < len(revision) <= _MAX_REVISION and revision.isprintable() and ".." not in revision)
    if not (_REPO.fullmatch(repo) and known and plain) or ".." in repo or "--" in repo:
        hint = "write hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME/FILE"
        raise UsageError("hub-address", f"{_text(path)!r} is no address of a repository", hint=hint)
    return Address(repo, revision or None, file)


def parse_repo(path: object) -> Address:
    """Like ``parse_address``, of a whole repository."""
    found = parse_address(path)
    if found.file is not None:
        raise UsageError("hub-address", f"{_text(path)!r} names a file, not a repository", hint="write ORG/NAME or ORG/NAME@REVISION")
    return found


def find_address(path: object) -> Address | None:
    """The address of what is no local path: ``hf://…``, or a string ``org/name`` under which nothing lies here; None for all else.

    >>> find_address("model.gguf") is None
    True
    """
    if is_address(path):
        return parse_address(path)
    text = path if isinstance(path, str) else ""
    shaped = _REPO.fullmatch(text.partition("@")[0]) is not None and not text.endswith((".gguf", ".safetensors", ".bin", ".pt"))
    return parse_address(text) if shaped and not Path(text).exists() and not Path(text).parent.exists() else None

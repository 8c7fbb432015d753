"""Every error a user can meet, one root class, and the table of stable codes.

A message says what, where, expected against found, and what to do. Children differ by what the *user* does next,
and each carries the process exit code that ``qconvert`` returns for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "BadFile",
    "Mismatch",
    "OutputError",
    "QFormatError",
    "RemoteError",
    "Unsafe",
    "Unsupported",
    "UsageError",
    "WouldLose",
    "did_you_mean",
    "printable",
    "redacted",
]

_SECRET = re.compile(r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}|(?<=Bearer )\S+")


def redacted(text: str) -> str:
    """``text`` without access tokens.

    >>> redacted("token hf_" + "a" * 34)
    'token hf_…'
    """
    return _SECRET.sub(lambda found: "hf_…" if found[0].startswith("hf_") else "…", text)


def printable(text: str, limit: int = 200) -> str:
    """Escape control characters of untrusted ``text`` and shorten it to ``limit`` characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The beginning of a hint: the known word that is closest to ``word``, or nothing where none is close.

    >>> did_you_mean("guff", ["gptq", "gguf"]), did_you_mean("zzz", ["gguf"])
    ("did you mean 'gguf'? ", '')
    """
    import difflib

    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}? " if close else ""


class QFormatError(Exception):
    """The root of all errors raised on purpose.

    Attributes: ``code`` (stable string, listed in the docs), ``path``, ``tensor``, ``offset_bytes``, ``hint`` (what to do).
    """

    exit_code = 1

    def __init__(
        self,
        code: str,
        message: str,
        *,
        path: object = None,
        tensor: str | None = None,
        offset_bytes: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.code = code
        self.message = printable(redacted(message), 2000)
        self.path = None if path is None else _spelled(path)
        self.tensor = tensor
        self.offset_bytes = offset_bytes
        self.hint = None if hint is None else redacted(hint)
        super().__init__(str(self))

    def __str__(self) -> str:
        where = []
        if self.path is not None:
            where.append(printable(self.path, 400))
        if self.tensor is not None:
            where.append(f"tensor {printable(self.tensor)!r}")
        if self.offset_bytes is not None:
            where.append(f"byte {self.offset_bytes}")
        head = f"{', '.join(where)}: " if where else ""
        tail = f" — {printable(self.hint, 500)}" if self.hint else ""
        return f"{head}{self.message}{tail} [{self.code}]"

    def locate(self, *, path: object = None, tensor: str | None = None) -> None:
        """Fill in where it happened, where that is not known yet."""
        if self.path is None and path is not None:
            self.path = _spelled(path)
        if self.tensor is None:
            self.tensor = tensor
        self.args = (str(self),)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.code, self.message, self.path, self.tensor, self.offset_bytes, self.hint)


def _spelled(path: object) -> str:
    """A path; an address that went through a ``Path`` gets back the slash that it lost there."""
    text = str(path)
    return f"hf://{text[4:]}" if text.startswith("hf:/") and not text.startswith("hf://") else text


def _rebuild(
    cls: type[QFormatError], code: str, message: str, path: str | None, tensor: str | None, at: int | None, hint: str | None
) -> QFormatError:
    return cls(code, message, path=path, tensor=tensor, offset_bytes=at, hint=hint)


class UsageError(QFormatError):
    """The request itself is wrong: an unknown target, an option that does not fit."""

    exit_code = 2


class Mismatch(QFormatError):
    """``verify`` found bytes or values that differ."""

    exit_code = 3


class OutputError(QFormatError):
    """The destination cannot be written: no space, no permission, it exists, it is the source."""

    exit_code = 4


class BadFile(QFormatError):
    """The source is broken or contradicts itself."""

    exit_code = 5


class Unsafe(QFormatError):
    """The source asks for something that is refused for safety: a pickle, a path that escapes its directory."""

    exit_code = 5


class Unsupported(QFormatError):
    """A combination that cannot be converted, said by name."""

    exit_code = 6


class WouldLose(QFormatError):
    """The best possible conversion is not as exact as the user asked for."""

    exit_code = 7


class RemoteError(QFormatError):
    """A hub or network problem: missing, gated, unreachable."""

    exit_code = 8

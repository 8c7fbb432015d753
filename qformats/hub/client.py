"""Calls of the hub through ``huggingface_hub``: what a revision holds, and every failure as one ``RemoteError`` that says what to do.

Nothing secret leaves this module: messages and the client's own log lines lose tokens and the queries of signed addresses.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from qformats.errors import OutputError, QFormatError, RemoteError, Unsupported, redacted
from qformats.hub.names import Address

__all__ = ["RemoteFile", "Snapshot", "api", "asked", "describe", "endpoint", "is_offline", "package", "snapshot", "translated"]

_QUERY = re.compile(r"(https?://[^\s'\"<>?]+)\?[^\s'\"<>]*")
_NO_SPACE = (28, 122)  # ENOSPC, EDQUOT
_PASSING = (429, 500, 502, 503, 504)  # answers that another try may better
_CUT = frozenset({"RemoteProtocolError", "ReadError", "WriteError", "ReadTimeout", "WriteTimeout"})  # of a connection that was there
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_MOST_WAIT_S = 60.0
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class RemoteFile:
    """``sha256`` of what is kept as a large file, None for the others; ``blob``: git's id of the file or of the pointer to it."""

    name: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit of a repository, by name."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]
    private: bool = False

    def address(self, file: str | None = None) -> Address:
        """The address of a file of it, by commit."""
        return Address(self.repo, self.commit, file)


def package() -> Any:
    """``huggingface_hub``, its log lines freed of secrets."""
    try:
        import huggingface_hub
        import huggingface_hub.utils  # loaded only when asked for
    except ImportError:
        hint = "pip install huggingface_hub"
        raise Unsupported("hub-client", "the package huggingface_hub is not installed", hint=hint) from None
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(known, _Redacting) for known in handler.filters):
            handler.addFilter(_Redacting())
    return huggingface_hub


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = clean(record.getMessage()), ()
        return True


def clean(text: str) -> str:
    """``text`` without tokens and without the queries of addresses."""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    text = redacted(_QUERY.sub(r"\1?…", text))
    return text.replace(token, "…") if len(token) >= 8 else text


def endpoint() -> str:
    """Where the hub is, without a slash at the end."""
    package()
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether the client was told to stay off the network (``HF_HUB_OFFLINE``)."""
    package()
    from huggingface_hub import constants

    asked = getattr(constants, "is_offline_mode", None)
    return bool(asked()) if asked is not None else bool(constants.HF_HUB_OFFLINE)


def api() -> Any:
    """The client's API object; the token is the one that ``hf auth login`` or ``HF_TOKEN`` gave."""
    return package().HfApi(endpoint=endpoint(), library_name="qformats")


@contextmanager
def translated(address: Address | str) -> Iterator[None]:
    """Turn whatever the client raises inside into one ``QFormatError``; its progress bars are silent meanwhile."""
    utils = package().utils
    silent = utils.are_progress_bars_disabled()
    if not silent:
        utils.disable_progress_bars()
    try:
        yield
    except QFormatError:
        raise
    except Exception as error:
        raise describe(error, address) from None
    finally:
        if not silent:
            utils.enable_progress_bars()


def asked(address: Address | str, question: Callable[[], _Answer]) -> _Answer:
    """The answer to what may be asked twice: again where the hub is busy or broken for a moment, or hung up; else as ``translated``."""
    with translated(address):
        for wait_s in _WAITS_S:
            try:
                return question()
            except Exception as error:
                told_s = _patience(error)
                if told_s is None or told_s > _MOST_WAIT_S:
                    raise
            time.sleep(max(wait_s, told_s))
        return question()


def _patience(error: BaseException) -> float | None:
    """How long the hub wants to be left alone before the next try; None where that would not help."""
    for cause in _causes(error):
        answer = getattr(cause, "response", None)
        if answer is not None and int(answer.status_code) in _PASSING:
            told = str(answer.headers.get("Retry-After", ""))
            return float(told) if told.isdecimal() else 0.0
        if any(kind.__name__ in _CUT for kind in type(cause).__mro__):
            return 0.0
    return None


def describe(error: BaseException, address: Address | str) -> QFormatError:
    """What went wrong at ``address`` and what to do about it, without secrets."""
    from huggingface_hub import errors

    chain = list(_causes(error))
    for kind, code, message, hint in _KINDS:
        if code == "hub-offline" and not is_offline():
            continue  # the client says so of every failure without a copy in its cache
        if any(isinstance(cause, getattr(errors, name, ())) for cause in chain for name in kind.split()):
            return RemoteError(code, message, path=address, hint=hint)
    space = next((cause for cause in chain if isinstance(cause, OSError) and cause.errno in _NO_SPACE), None)
    if space is not None or any("disk space" in str(cause) for cause in chain):
        return OutputError("no-space", "the disk is full", path=address, hint="free space or choose another place (HF_HOME)")
    answer = next((found for cause in chain if (found := getattr(cause, "response", None)) is not None), None)
    if answer is not None:
        return _of_status(int(answer.status_code), error, address)
    return _of_exception(chain, error, address)


_KINDS = (
    ("GatedRepoError", "hub-gated", "access to the repository is restricted",
     "ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"),
    ("DisabledRepoError", "hub-disabled", "the repository is disabled", "choose another one"),
    ("RevisionNotFoundError", "hub-revision", "the repository has no such revision", "check the branch, tag or commit behind the @"),
    ("RemoteEntryNotFoundError", "hub-file", "the repository has no such file", "list its files with `qconvert pull --list`"),
    ("RepositoryNotFoundError", "hub-repository", "there is no such repository, or it is private",
     "check its name; for a private one log in with `hf auth login` or set HF_TOKEN"),
    ("OfflineModeIsEnabled LocalEntryNotFoundError IncompleteSnapshotError", "hub-offline", "is not in the cache and cannot be fetched",
     "pull it once while online; without HF_HUB_OFFLINE=1 it is fetched when needed"),
    ("LocalTokenNotFoundError", "hub-token", "there is no token", "log in with `hf auth login` or set HF_TOKEN"),
    ("HFValidationError", "hub-address", "is no address that the hub accepts", "write ORG/NAME"),
)  # fmt: skip


def _of_status(status: int, error: BaseException, address: Address | str) -> RemoteError:
    words = clean(str(error)).strip().splitlines()
    said = words[-1].strip() if words else ""
    if status == 401:
        return RemoteError("hub-token", "the hub wants a token, or does not know this one", path=address,
                           hint="log in with `hf auth login` or set HF_TOKEN")  # fmt: skip
    if status == 403:
        return RemoteError("hub-forbidden", f"the hub forbids it: {said}", path=address, hint="use a token that may write there")
    if status == 412:
        return RemoteError("hub-conflict", "the repository was changed meanwhile", path=address, hint="run the same command again")
    if status == 429:
        return RemoteError("hub-rate", "the hub asks to wait: too many requests", path=address, hint="try again in a few minutes")
    if status >= 500:
        return RemoteError("hub-server", f"the hub answers with error {status}", path=address, hint="try again later")
    return RemoteError("hub-request", f"the hub refuses the request ({status}): {said}", path=address)


def _of_exception(chain: list[BaseException], error: BaseException, address: Address | str) -> QFormatError:
    names = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    said = clean(str(chain[-1])) or type(chain[-1]).__name__
    if names & {"TransportError", "TimeoutException", "ConnectionError"}:
        return RemoteError("hub-connection", f"the connection failed: {said}", path=address,
                           hint="check the network and run the same command again")  # fmt: skip
    if "UnicodeEncodeError" in names:
        return RemoteError("hub-token", "the token holds letters that no token has", path=address, hint="copy it again, or log in anew")
    if isinstance(error, OSError) and error.errno is not None:
        return OutputError("unwritable", f"cannot be written: {error.strerror}", path=address, hint="check the place and its permissions")
    return RemoteError("hub-answer", f"the client stopped: {type(error).__name__}: {clean(str(error))}", path=address)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def snapshot(address: Address) -> Snapshot:
    """The commit that ``address`` names now, and its files with sizes and digests: one request."""
    found = asked(address, lambda: api().model_info(address.repo, revision=address.revision, files_metadata=True))
    files = {}
    for entry in found.siblings or ():
        lfs = entry.lfs
        digest = None if lfs is None else getattr(lfs, "sha256", None) or lfs["sha256"]
        files[entry.rfilename] = RemoteFile(entry.rfilename, int(entry.size or 0), digest, entry.blob_id)
    return Snapshot(address.repo, str(found.sha), files, bool(found.private))

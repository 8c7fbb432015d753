"""Files up: one commit holds the files and the card that describes them, or nothing changes.

Large files go up before the commit and stay known to the hub by their digest, so that a push that was killed sends only what is missing.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformats.checkpoint import Checkpoint, is_remote_path, open_checkpoint
from qformats.containers.gguf import SHARD_NAME
from qformats.errors import BadFile, OutputError, QFormatError, RemoteError, UsageError
from qformats.hub import client
from qformats.hub.card import About, Entry, entries_of, written
from qformats.hub.names import Address, parse_repo
from qformats.hub.pull import cached_file

__all__ = ["MAX_FILE_NBYTES", "Pushed", "check_target", "gguf_name", "push_to_hub"]

MAX_FILE_NBYTES = 50_000_000_000  # what the hub serves over plain HTTP (huggingface_hub 2.4, constants.MAX_HTTP_DOWNLOAD_SIZE)
CARD = "README.md"
_TRIES = 4
# llama_ftype (llama.cpp, include/llama.h) as file names spell it
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L",
    14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
_ENCODED = re.compile(r"(?i)[-.](I?Q\d\w*|T?Q\d\w*|F16|F32|BF16|MXFP4\w*|NVFP4)$")


@dataclass(frozen=True)
class Pushed:
    """``commit`` and the addresses of it, of the repository and of the pull request, if one was made; ``files`` that were written."""

    repo: str
    commit: str
    url: str
    files: tuple[str, ...]
    pull_request: str | None = None


def push_to_hub(
    path: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    report: Mapping[str, Any] | None = None,
) -> Pushed:
    """Put the checkpoint at ``path`` (a .gguf, one of its shards, or a directory) into ``repo``, made if it is missing.

    ``repo``: ``org/name``, or ``name`` in the namespace of whoever is logged in.

    ``private``: of a repository that is made (None: the owner's default). ``revision``: a branch, made if it is missing.
    ``create_pr``: propose the commit instead. ``base_model``: the repository it was made from, whose licence is copied.
    ``report``: ``to_json`` of the conversion's report, for what the card says of exactness. A GGUF is named ``Model-TYPE.gguf``; files
    that are there stay.

    Raises ``RemoteError``, and ``UsageError('hub-file-size')`` for a file that the hub would not serve. A failed push changes no file.
    """
    if is_remote_path(path):
        raise UsageError("push-source", "is a repository already", path=path, hint="pull it first: qconvert pull")
    address = check_target(repo)
    base_model = base_model and parse_repo(base_model).repo
    target = Address(address.repo, revision or address.revision)
    with open_checkpoint(path) as checkpoint:
        files = _files(Path(path), target.repo, checkpoint)
        entry = _entry(checkpoint, files, report)
        base = base_model or _base(checkpoint, report)
    _check_sizes(files)
    api = client.api()
    client.asked(target, lambda: api.create_repo(target.repo, exist_ok=True, **({} if private is None else {"private": private})))
    if target.revision is not None and not create_pr:
        client.asked(target, lambda: api.create_branch(target.repo, branch=target.revision, exist_ok=True))
    about = About(target.repo, entry.tool, base, _inherited(Path(path), base, checkpoint), target.revision)
    words = message or f"Upload {entry.type or entry.format} with qformats"
    return _Push(api, target, files, entry, about, words, create_pr).run()


def check_target(repo: str) -> Address:
    """The repository that ``repo`` names, with its owner, asked of the hub where it names none; what can be refused before any work.

    Raises ``UsageError('hub-address')``, and ``RemoteError`` (``hub-offline``, ``hub-token``) where nothing can be written.
    """
    name = repo.removeprefix("hf://")
    if "/" in name:
        parse_repo(repo)
    if client.is_offline():
        hint = "unset HF_HUB_OFFLINE"
        raise RemoteError("hub-offline", "a push needs the network, which HF_HUB_OFFLINE forbids", path=repo, hint=hint)
    if client.package().get_token() is None:
        hint = "log in with `hf auth login` or set HF_TOKEN"
        raise RemoteError("hub-token", "there is no token, and writing needs one", path=repo, hint=hint)
    return parse_repo(repo if "/" in name else f"{client.asked(repo, client.api().whoami)['name']}/{name}")


# ---------------------------------------------------------------- what is pushed


def _files(path: Path, repo: str, checkpoint: Checkpoint) -> dict[str, Path]:
    """Local files by their names in the repository; the card is not among them."""
    if path.is_dir():
        return dict(sorted((p.relative_to(path).as_posix(), p) for p in _inside(path)))
    if checkpoint.gguf is None:
        hint = "push the directory it is in"
        raise UsageError("hub-single-file", "is one file of a checkpoint", path=path, hint=hint)
    match = SHARD_NAME.fullmatch(path.name)
    if checkpoint.gguf.shards <= 1 or match is None:
        return {gguf_name(path.name, repo, checkpoint): path}
    stem = gguf_name(f"{match[1]}.gguf", repo, checkpoint).removesuffix(".gguf")
    numbers = range(1, checkpoint.gguf.shards + 1)
    return {f"{stem}-{n:05d}-of-{match[3]}.gguf": path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in numbers}


def _inside(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        inner = path.relative_to(folder)
        if any(word.startswith(".") for word in inner.parts) or inner.as_posix() == CARD:
            continue
        if path.is_symlink() and not path.exists():
            raise BadFile("unreadable", "is a link to nothing", path=path, hint="remove it, or restore what it points to")
        if path.is_file():
            yield path


def gguf_name(name: str, repo: str, checkpoint: Checkpoint) -> str:
    """``name`` if it says its type, as in ``Model-Q4_K_M.gguf``, else the repository's name (without ``-GGUF``) and the type."""
    stem = name.removesuffix(".gguf")
    if _ENCODED.search(stem):
        return name
    model = re.sub(r"(?i)[-_.]gguf$", "", repo.rpartition("/")[2])
    return f"{model}-{_gguf_type(checkpoint)}.gguf"


def _gguf_type(checkpoint: Checkpoint) -> str:
    said = checkpoint.metadata.get("general.file_type")
    number = getattr(said, "value", None)
    if number in _FILE_TYPES:
        return _FILE_TYPES[int(number)]
    weights: Counter[str] = Counter()
    for raw in checkpoint.raw.values():
        if len(raw.shape) > 1:
            weights[raw.dtype] += raw.nbytes
    return weights.most_common(1)[0][0] if weights else "F32"


def _entry(checkpoint: Checkpoint, files: Mapping[str, Path], report: Mapping[str, Any] | None) -> Entry:
    import qformats

    weights = {n: p for n, p in files.items() if n.endswith((".gguf", ".safetensors"))}
    nbytes = sum(path.stat().st_size for path in weights.values())
    record = checkpoint.provenance or {}
    origin = record.get("source")
    source = str(origin["format"]) if isinstance(origin, dict) and "format" in origin else ""
    made = str(record.get("tool", "")) or f"qformats {qformats.version}"
    kinds, error = _kinds(report)
    gguf = checkpoint.gguf is not None
    kind = _gguf_type(checkpoint) if gguf else _label(checkpoint)
    return Entry(min(weights) if gguf else "", checkpoint.format, kind, nbytes, len(weights), source, kinds, error, made)


def _kinds(report: Mapping[str, Any] | None) -> tuple[dict[str, int], float | None]:
    """Tensors by kind and the largest error that a report tells."""
    kinds: Counter[str] = Counter()
    errors: list[float] = []
    for line in (report or {}).get("tensors", ()):
        kinds[str(line["kind"])] += 1
        if isinstance(line.get("error"), int | float):
            errors.append(float(line["error"]))
    return dict(kinds), max(errors, default=None)


def _label(checkpoint: Checkpoint) -> str:
    """The type most weights of a directory have."""
    from qformats.scheme import Float, Integer, Table

    found: Counter[str] = Counter()
    for name, module in checkpoint.modules.items():
        nbytes = sum(raw.nbytes for raw in module.parts.values())
        if not checkpoint.is_quantized(name):
            found.update({raw.dtype.lower(): raw.nbytes for raw in module.parts.values() if checkpoint.format == "hf"})
            continue
        grid = checkpoint.scheme(name).grid
        word = f"int{grid.bits}" if isinstance(grid, Integer) else grid.name if isinstance(grid, Float | Table) else "learned"
        found[word] += nbytes
    return found.most_common(1)[0][0] if found else ""


def _check_sizes(files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        nbytes = path.stat().st_size
        if nbytes > MAX_FILE_NBYTES:
            text = f"{name} has {nbytes} bytes, more than the {MAX_FILE_NBYTES} of one file on the hub"
            raise UsageError("hub-file-size", text, path=path, hint="qconvert split --max-size 40G cuts a GGUF into shards")


# ---------------------------------------------------------------- what is said of it


def _base(checkpoint: Checkpoint, report: Mapping[str, Any] | None) -> str | None:
    """The repository that the model was made from, as far as the report or the model says."""
    source = str((report or {}).get("source", ""))
    words = [source.removeprefix("hf://") if source.startswith("hf://") else ""]
    stored = checkpoint.metadata.get("general.base_model.0.repo_url")
    words.append(str(getattr(stored, "value", "")).removeprefix("https://huggingface.co/"))
    words.append(str(checkpoint.config.get("_name_or_path", "")))
    for word in words:
        try:
            return parse_repo("/".join(word.split("/")[:2]).partition("@")[0]).repo
        except UsageError:
            continue
    return None


def _inherited(path: Path, base: str | None, checkpoint: Checkpoint) -> dict[str, Any]:
    """Metadata to take over: of the base model's card, and the licence that a GGUF names."""
    found: dict[str, Any] = {}
    stored = checkpoint.metadata.get("general.license")
    if getattr(stored, "type", None) == "str":
        found["license"] = str(getattr(stored, "value", ""))
    if base is not None:
        try:
            card = client.asked(base, lambda: client.api().model_info(base)).card_data
        except RemoteError:
            return found  # a base that is gone or private has nothing to say; the push goes on without it
        found.update({} if card is None else {key: value for key, value in card.to_dict().items() if value})
    return found


@dataclass
class _Push:
    api: Any
    target: Address
    files: Mapping[str, Path]
    entry: Entry
    about: About
    message: str
    create_pr: bool

    def run(self) -> Pushed:
        """Commit; where somebody else was quicker, read the card again and commit again; where an answer was lost, look first."""
        package = client.package()
        adds = [package.CommitOperationAdd(name, str(path)) for name, path in self.files.items()]
        last: QFormatError | None = None
        sent: str | None = None
        for attempt in range(_TRIES):
            found = client.snapshot(self.target)
            text = self._card(found)
            if sent is not None and not self.create_pr and self._is_there(found, adds, sent):
                return self._pushed(found.commit, None)
            card = package.CommitOperationAdd(CARD, text.encode())
            try:
                with client.translated(self.target):
                    made = self.api.create_commit(
                        self.target.repo, [*adds, card], commit_message=self.message, revision=self.target.revision,
                        create_pr=self.create_pr, parent_commit=found.commit,
                    )  # fmt: skip
                return self._pushed(made.oid, made.pr_url)
            except RemoteError as error:
                if error.code not in ("hub-conflict", "hub-server", "hub-connection", "hub-rate"):
                    raise
                last = error
                sent = text if error.code != "hub-conflict" or sent is not None else None
                time.sleep(2**attempt)
        assert last is not None
        raise last

    def _card(self, found: client.Snapshot) -> str:
        """The card that the repository, else the directory, has, with our section."""
        existing = None
        if CARD in found.files:
            existing = _text(cached_file(found.address(CARD), found.files[CARD], self.target.revision))
        elif (local := next(iter(self.files.values())).parent / CARD).is_file() and not self.entry.name:
            existing = _text(local)
        here = set(found.files) | set(self.files)
        keep = [e for e in entries_of(existing or "") if e.name != self.entry.name and (e.name in here or not e.name)]
        return written(existing, self.about, sorted([*keep, self.entry], key=lambda e: (e.format != "gguf", e.nbytes, e.name)))

    def _is_there(self, found: client.Snapshot, adds: list[Any], text: str) -> bool:
        """Whether a commit whose answer was lost was made."""
        for add in adds:
            file = found.files.get(add.path_in_repo)
            known = None if file is None else file.sha256
            if file is None or file.size != add.upload_info.size or (known is not None and known != add.upload_info.sha256.hex()):
                return False
        card = found.files.get(CARD)
        return card is not None and _text(cached_file(found.address(CARD), card)) == text

    def _pushed(self, commit: str, pull_request: str | None) -> Pushed:
        url = f"{client.endpoint()}/{self.target.repo}"
        return Pushed(self.target.repo, commit, url, (*self.files, CARD), pull_request)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        hint = "save README.md of the repository as UTF-8"
        raise RemoteError("hub-card", "the model card is not UTF-8", path=path, hint=hint) from None
    except OSError as error:
        raise OutputError("unreadable", f"cannot be read: {error.strerror}", path=path) from None

"""A repository as a checkpoint: small files through the client's cache, weights where they lie, read by ranges.

``qformats.checkpoint`` names this module in a table and imports it only for an address.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from qformats.checkpoint import SIDE_FILES, Checkpoint, open_checkpoint, open_sources, pickle_refusal, small_names
from qformats.containers.index import INDEX_NAME, INDEX_SUFFIX, SINGLE_NAME, read_index
from qformats.containers.source import ByteSource, FileSource
from qformats.errors import BadFile, RemoteError, UsageError
from qformats.hub import client
from qformats.hub.names import Address, find_address
from qformats.hub.pull import cached, cached_file, few, held, literal
from qformats.hub.source import HubSource, Spool

__all__ = ["fetched", "fetched_beside", "fetched_config", "fetched_file", "find_address", "needed", "open_remote"]

_SIDE = (*SIDE_FILES, "README.md", "LICENSE")
_TEXTS = (".json", ".jinja", ".txt", ".model")
_PICKLED = (".bin", ".pt", ".pth")


def open_remote(address: Address, allow_pickle: bool = False) -> Checkpoint:
    """Open what ``address`` names; raises as ``open_checkpoint`` does, and ``RemoteError``.

    Offline, and for files of ``torch.save``, it is the copy in the client's cache that is opened.
    """
    if client.is_offline():
        return replace(open_checkpoint(fetched(address), allow_pickle), origin=str(address))
    found = client.snapshot(address)
    weights = _weights(found, address)
    if not weights:
        if not (address.file or any(name.endswith(_PICKLED) for name in found.files)):
            raise BadFile("no-weights", "holds no weights", path=address, hint=f"it holds {few(found.files)}")
        if not allow_pickle:
            raise pickle_refusal(address)
        opened = open_checkpoint(fetched(found.address(address.file)), allow_pickle)
        return replace(opened, origin=str(address))
    spool = Spool()
    sources = {name: _source(found, name, spool) for name in weights}
    if weights[0].endswith(".gguf"):
        folder, prepare = Path(str(found.address())), None
    else:
        folder = _fetch_small(found, small_names())
        prepare = partial(_fetch_side, found)
    path = folder / weights[0] if address.file is not None or weights[0].endswith(".gguf") else folder
    opened = open_sources(path, sources)
    return replace(opened, origin=str(address), prepare=prepare)


def _source(found: client.Snapshot, name: str, spool: Spool) -> ByteSource:
    """A file of weights: that in the cache, if it is there."""
    known = client.package().try_to_load_from_cache(found.repo, name, revision=found.commit)
    return FileSource(known) if isinstance(known, str) else HubSource(found.address(), found.files[name], spool)


def _weights(found: client.Snapshot, address: Address) -> list[str]:
    """The files of weights to open by their ranges; none for what has to be fetched first."""
    file = address.file
    if file is not None:
        if file not in found.files:
            close = [name for name in sorted(found.files) if name.endswith((".gguf", ".safetensors"))]
            hint = f"files of weights: {', '.join(close[:12]) or 'none'}"
            raise RemoteError("hub-file", "the repository has no such file", path=address, hint=hint)
        return [] if file.endswith(_PICKLED) else _shards(found, file)
    top = [name for name in sorted(found.files) if "/" not in name]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    gguf = [name for name in top if name.endswith(".gguf")]
    if safetensors or not gguf:
        return safetensors
    first = [name for name in gguf if "-of-" not in name or "-00001-of-" in name]
    if len(first) != 1:
        names = ", ".join(first[:12]) + (" …" if len(first) > 12 else "")
        raise BadFile("several-gguf", f"holds {len(gguf)} GGUF files", path=address, hint=f"name one of them: {names}")
    return _shards(found, first[0])


def _shards(found: client.Snapshot, file: str) -> list[str]:
    """``file`` and, where it is the shard of a GGUF, the others, the first one first."""
    from qformats.containers.gguf import SHARD_NAME

    folder, slash, name = file.rpartition("/")
    match = SHARD_NAME.fullmatch(name)
    if match is None:
        return [file]
    names = [f"{folder}{slash}{match[1]}-{number + 1:05d}-of-{match[3]}.gguf" for number in range(int(match[3]))]
    return [name for name in names if name in found.files]


def _one_kind(found: client.Snapshot, weights: list[str]) -> list[str]:
    """The files that opening a directory of these would read: repositories may hold the same weights twice."""
    indexes = [name for name in found.files if name.endswith(INDEX_SUFFIX) and "/" not in name]
    if SINGLE_NAME in weights:
        return [SINGLE_NAME]
    if INDEX_NAME not in indexes and len(indexes) != 1:
        return weights
    index = INDEX_NAME if INDEX_NAME in indexes else indexes[0]
    shards = set(read_index(cached_file(found.address(index), found.files[index])).values())
    return [name for name in weights if name in shards] or weights


def _fetch_small(found: client.Snapshot, wanted: tuple[str, ...]) -> Path:
    """Fetch those of the ``wanted`` files that there are, and indexes; the directory of the cache they are in."""
    names = [name for name in found.files if name in wanted or (name.endswith(INDEX_SUFFIX) and "/" not in name)]
    folder = _cache_folder(found)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        cached_file(found.address(name), found.files[name])
    return folder


def _fetch_side(found: client.Snapshot) -> None:
    _fetch_small(found, _SIDE)


def _cache_folder(found: client.Snapshot) -> Path:
    """Where the client's cache has the files of this commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=found.repo, repo_type="model") / "snapshots" / found.commit


def fetched(address: Address) -> Path:
    """A local copy of what ``address`` names in the client's cache, fetched where it is missing: weights, configuration, tokenizer.

    Of a repository with safetensors these and no other weights; of one with a single GGUF that file.
    """
    if client.is_offline():
        folder = cached(address, () if address.file is None else (address.file,))
        if address.file is None:
            _check_cached(address, folder)
            return folder
        return folder / held(address, folder)[0]
    found = client.snapshot(address)
    names = needed(found, address)
    for name in names:
        cached_file(found.address(name), found.files[name], address.revision)
    folder = _cache_folder(found)
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    single = address.file or gguf
    return folder if single is None else folder / single


def _check_cached(address: Address, folder: Path) -> None:
    """``RemoteError('hub-offline')`` unless the weights of a repository are in the cache, all shards of them."""
    here = {path.name for path in folder.iterdir()}
    shards = [name for index in here if index.endswith(INDEX_SUFFIX) for name in read_index(folder / index).values()]
    missing = sorted(set(shards) - here)
    if (shards and missing and SINGLE_NAME not in here) or not any(name.endswith((".safetensors", ".gguf", *_PICKLED)) for name in here):
        text = f"{missing[0] if missing else 'the file of its weights'} is not in the cache and cannot be fetched"
        raise RemoteError("hub-offline", text, path=address, hint="pull it once while online: qconvert pull")


def fetched_file(address: Address) -> Path:
    """A local copy of the one file that ``address`` names, in the client's cache."""
    if address.file is None:
        raise UsageError("hub-address", f"{address} names no file", hint="write hf://ORG/NAME/FILE")
    return cached(address, (literal(address.file),)) / address.file


def fetched_config(address: Address) -> Path | None:
    """The directory of the cache with the small files of a repository that has a config.json, fetched; None for all else."""
    if address.file is not None:
        return None
    if client.is_offline():
        folder = cached(address)
        return folder if (folder / "config.json").is_file() else None
    found = client.snapshot(address)
    return _fetch_small(found, small_names()) if "config.json" in found.files else None


def fetched_beside(address: Address, wanted: tuple[str, ...]) -> Path | None:
    """The directory of the cache with what lies beside the weights, fetched without them; None where none of ``wanted`` is there.

    Of a repository whose weights are GGUF files alone it is None, too: these hold what is beside others.
    """
    if address.file is not None and address.file.endswith(".gguf"):
        return None
    if client.is_offline():
        folder = cached(address)
        names = [path.name for path in folder.iterdir()]
    else:
        found = client.snapshot(address)
        folder, names = _cache_folder(found), [name for name in found.files if "/" not in name]
    packed = any(name.endswith(".gguf") for name in names) and not any(name.endswith((".safetensors", *_PICKLED)) for name in names)
    if packed or not any(name in wanted for name in names):
        return None
    return folder if client.is_offline() else _fetch_small(found, tuple(_side(found)))


def needed(found: client.Snapshot, address: Address) -> list[str]:
    """The files that a conversion or a model of ``address`` reads, weights first: those of one kind, configuration, tokenizer."""
    weights = _one_kind(found, _weights(found, address)) or [name for name in found.files if name.endswith(_PICKLED) and "/" not in name]
    if address.file is not None and not address.file.endswith(".gguf"):
        weights = [address.file]
    if not weights:
        raise BadFile("no-weights", "holds no weights", path=address, hint=f"it holds {few(found.files)}")
    return list(dict.fromkeys((*weights, *_side(found))))


def _side(found: client.Snapshot) -> list[str]:
    return [name for name in found.files if name in _SIDE or (name.endswith(_TEXTS) and "/" not in name)]

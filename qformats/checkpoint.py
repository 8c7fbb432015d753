"""A checkpoint: what a path holds, as configuration, side files and lazily read modules. Opening it imports no torch.

``open(path)`` takes a directory with safetensors, a single .safetensors file or a .gguf file (one shard opens all). With
``allow_pickle`` also a directory or a file of ``torch.save``, of which nothing is run (``qformats.containers.unpickle``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformats import registry
from qformats.containers.gguf import GGUFFile, open_gguf, open_gguf_sources
from qformats.containers.index import open_directory
from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import open_safetensors
from qformats.containers.source import ByteSource, FileSource, near
from qformats.containers.torch_directory import SUFFIXES, TorchSet, is_torch_name, open_torch_directory, open_torch_file
from qformats.errors import BadFile, QFormatError, Unsafe, Unsupported, UsageError, did_you_mean
from qformats.formats.protocol import Match, Module
from qformats.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.architectures import Binding
    from qformats.tensor import QuantizedTensor

__all__ = [
    "FLOAT_TYPES", "INTEGER_TYPES", "PROVENANCE_KEY", "Checkpoint", "Unwritten", "fetched", "fetched_beside", "fetched_config",
    "fetched_file", "is_remote_path", "open_checkpoint", "open_found", "open_sources", "open_unwritten", "pickle_refusal", "small_names",
]  # fmt: skip

PROVENANCE_KEY = "qformats.provenance"
FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
INTEGER_TYPES = ("I8", "I16", "I32", "I64")
_BESIDE = tuple(dict.fromkeys(name for row in registry.ROWS for name in row.configs))  # where a format says what it is
SIDE_FILES = (
    "config.json", "generation_config.json", *_BESIDE, "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "modules.json",
    "1_Pooling/config.json",
)  # fmt: skip
_MAX_SIDE_NBYTES = 256_000_000
REMOTE_SCHEMES, REMOTE_OPENER = ("hf:/",), "qformats.hub.opening"  # imported only for an address: it comes later in the order of rooms


@dataclass(frozen=True)
class Unwritten:
    """What a checkpoint has that no file holds yet: its small files by name, and how its headers end once its weights are written.

    ``sealed`` gives the final header of each file, by the names of the files as they were written with the headers before.
    """

    small: Mapping[str, bytes]
    sealed: Callable[[Mapping[str, ByteSource]], Mapping[str, bytes]]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    ``format``: ``match.format``. ``container``: ``"safetensors"``, ``"torch"`` or ``"gguf"``. ``raw``: every stored tensor by full name.
    ``config``: config.json (``{}`` for GGUF or a bare file). ``metadata``: of the GGUF, or the safetensors ``__metadata__``.
    ``opened``: the files, where the tensors do not name each of them. ``unwritten``: of one that is made while it is read
    (``path`` is then that of what it is made from), else None. ``origin``: the address it was opened by, if that is no path.
    ``prepare``: brings the side files beside ``path`` before they are read.
    """

    path: Path
    container: str
    match: Match
    raw: Mapping[str, RawTensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    file_names: tuple[str, ...]
    gguf: GGUFFile | None = None
    warnings: tuple[str, ...] = field(default_factory=tuple)
    opened: tuple[ByteSource, ...] = ()
    unwritten: Unwritten | None = None
    origin: str | None = None
    prepare: Callable[[], None] | None = field(default=None, compare=False)

    @property
    def shown(self) -> str:
        """What to call it: its address, or its path."""
        return self.origin or str(self.path)

    def read_as(self, options: Mapping[str, str]) -> Checkpoint:
        """The same checkpoint under the user's ``options`` (see ``Match``); ``UsageError('source-option')`` for one unknown."""
        known = registry.row(self.match.format).source_options
        for key in options:
            if key not in known:
                text, close = f"{self.match.format} sources have no option {key!r}", did_you_mean(key, known)
                raise UsageError("source-option", text, hint=f"{close}options: {', '.join(known) or 'none'}")
        return replace(self, match=replace(self.match, options=dict(options)))

    @property
    def format(self) -> str:
        """The registry name of the format its quantized modules are in (``hf`` for floats)."""
        return self.match.format

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Modules by name in file order, each with its raw parts by leaf name."""
        grouped: dict[str, dict[str, RawTensor]] = {}
        split = {name: self._split_name(name) for name in self.raw}
        if "" in getattr(registry.format_module(self.match.format), "GLUED", ()):  # a weight may bear its module's name
            named = {module for module, _ in split.values()}
            split.update({name: (name, "") for name in self.raw if name in named})
        for name, (module, leaf) in split.items():
            grouped.setdefault(module, {})[leaf] = self.raw[name]
        dense = Match("gguf" if self.gguf else "hf", self.match.config if self.gguf else {})
        made = {m: Module(m, parts, self.match if self._is_quantized(parts) else dense) for m, parts in grouped.items()}
        if self.gguf is None and getattr(registry.format_module(self.match.format), "NEEDS_COLUMNS", False):
            return {m: replace(module, columns=self._columns(m)) if module.match is self.match else module for m, module in made.items()}
        return made

    def _columns(self, module: str) -> int | None:
        """in_features of a module as the architecture has it; None for one that is not known."""
        try:
            return self.binding.in_features(module)
        except QFormatError:
            return None

    def _split_name(self, name: str) -> tuple[str, str]:
        """A stored tensor's module and leaf."""
        return registry.split_name(self.match.format, name)

    def _is_quantized(self, parts: Mapping[str, RawTensor]) -> bool:
        if self.gguf is not None:
            weight = parts.get("weight")
            return weight is not None and weight.dtype not in (*FLOAT_TYPES, *INTEGER_TYPES)
        if self.match.format == "hf":
            return False
        form = registry.format_module(self.match.format)
        if hasattr(form, "holds_codes"):
            return bool(form.holds_codes(parts))
        return any(leaf in form.SUFFIXES for leaf in parts)

    def is_quantized(self, module: str) -> bool:
        """Whether a module's weight is stored as codes."""
        return self._is_quantized(self.modules[module].parts)

    @cached_property
    def by_outputs(self) -> frozenset[str]:
        """Modules of codes that have outputs as rows even where their floats have inputs: all, unless the format keeps the floats' axes."""
        if self.gguf is not None or getattr(registry.format_module(self.match.format), "KEEPS_AXES", False):
            return frozenset()
        return frozenset(module for module in self.modules if self.is_quantized(module))

    def is_bare(self, module: str) -> bool:
        """Whether a module of codes is a parameter that bears the module's own name where it is floats."""
        leaves: frozenset[str] = getattr(registry.format_module(self.match.format), "BARE", frozenset())
        return self.gguf is None and self.is_quantized(module) and any(leaf in leaves for leaf in self.modules[module].parts)

    @property
    def has_codes(self) -> bool:
        """Whether any weight is stored as codes."""
        return any(self.is_quantized(module) for module in self.modules)

    def scheme(self, module: str) -> Scheme:
        """The scheme of a quantized module, from headers only."""
        found = registry.format_module(self.modules[module].match.format).scheme(self.modules[module])
        assert isinstance(found, Scheme)
        return found

    @cached_property
    def extras(self) -> dict[tuple[str, str], str]:
        """Stored tensors that are no weights, by module and leaf, and what they are: the format's extras, or leaves unknown to it."""
        if self.gguf is not None or self.match.format == "hf":
            return {}
        form = registry.format_module(self.match.format)
        known: frozenset[str] = getattr(form, "EXTRAS", frozenset())
        found: dict[tuple[str, str], str] = {}
        for name, module in self.modules.items():
            own = {"weight", "bias", *form.SUFFIXES}
            for leaf in module.parts:
                if leaf in known:
                    found[name, leaf] = "belongs to the activations or the cache"
                elif self._is_quantized(module.parts) and leaf not in own:
                    found[name, leaf] = f"is not known to {self.match.format}"
        return found

    def check_extras(self) -> None:
        """Read the format's ``EXTRAS`` and refuse those that no activation can be scaled by (``BadFile``, see ``planes.check_extra``)."""
        from qformats.formats.planes import check_extra

        known: frozenset[str] = getattr(registry.format_module(self.match.format), "EXTRAS", frozenset()) if self.extras else frozenset()
        for module, leaf in self.extras:
            if leaf in known:
                check_extra(self.modules[module].parts[leaf], leaf)

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Logical shape of every tensor by module and leaf; a quantized module's planes count as its ``weight``, ``extras`` do not."""
        result: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, module in self.modules.items():
            if self.gguf is None and self._is_quantized(module.parts):
                rest = {leaf: raw.shape for leaf, raw in module.parts.items() if leaf == "bias"}
                result[name] = {"weight": self.scheme(name).shape, **rest}
            else:
                own = registry.format_module("gguf").SUFFIXES if self._is_quantized(module.parts) else ()
                rest = {leaf: raw.shape for leaf, raw in module.parts.items() if leaf not in own and (name, leaf) not in self.extras}
                if rest or not module.parts:
                    result[name] = rest
        return result

    def read(self, module: str, start: int = 0, stop: int | None = None, leaf: str = "weight") -> QuantizedTensor | Tensor:
        """Rows of a module's weight (canonical tensor or floats) or of another leaf (floats)."""
        found = self.modules[module]
        if leaf == "weight" and self._is_quantized(found.parts):
            tensor: QuantizedTensor = registry.format_module(found.match.format).read(found, start, stop)
            return tensor
        from qformats.formats.dense import read_float

        return read_float(found.parts[leaf], start, stop)

    @property
    def tensors(self) -> Tensors:
        """All tensors by full name (``module.weight``), read when asked for."""
        return Tensors(self)

    @cached_property
    def binding(self) -> Binding:
        """The model's architecture bound to its sizes."""
        from qformats import architectures

        if self.gguf is not None:
            kind = self.gguf.metadata.get("general.type")
            if kind is not None and kind.value == "adapter":
                raise Unsupported("adapter", "is an adapter, not a model", path=self.path, hint="qconvert gguf-to-lora converts it")
            return architectures.find_gguf(self.gguf.metadata).bind_gguf(self.gguf.metadata, self.raw)
        if not self.config and (self.path / "adapter_config.json").is_file():
            raise Unsupported("adapter", "is an adapter, not a model", path=self.path, hint="qconvert lora-to-gguf converts it")
        if not self.config:
            raise BadFile("config-missing", "no config.json beside the weights", path=self.path, hint="add the model's config.json")
        return architectures.find(dict(self.config)).bind(dict(self.config))

    def side_files(self) -> dict[str, bytes]:
        """The small files beside the weights (configs, tokenizer), by name."""
        if self.gguf is not None:
            return {}
        if self.unwritten is not None:
            return dict(self.unwritten.small)
        if self.prepare is not None:
            self.prepare()
        directory = self.path if self.path.is_dir() else self.path.parent
        return {name: _read_small(directory / name) for name in SIDE_FILES if (directory / name).is_file()}

    @cached_property
    def provenance(self) -> dict[str, Any] | None:
        """The record a conversion left, or None."""
        if self.gguf is not None:
            value = self.gguf.metadata.get(PROVENANCE_KEY)
            text = value.value if value is not None else None
        else:
            text = self.metadata.get(PROVENANCE_KEY)
        if text is None:
            return None
        try:
            record = json.loads(text)
        except (TypeError, ValueError):
            raise BadFile("provenance", "the provenance record is not JSON", path=self.path) from None
        if not isinstance(record, dict):
            raise BadFile("provenance", "the provenance record is not an object", path=self.path)
        return record

    def sources(self) -> list[Any]:
        """The distinct byte sources behind the tensors."""
        if self.opened:
            return list(self.opened)
        seen = {id(raw.source): raw.source for raw in self.raw.values()}
        return list(seen.values())

    def close(self) -> None:
        """Close the files."""
        for source in self.sources():
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Tensors(Mapping[str, Any]):
    """Read-only mapping from tensor name to value: ``QuantizedTensor`` for a quantized weight, a torch tensor otherwise."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def _leaves(self) -> Iterator[tuple[str, str]]:
        for name, module in self._checkpoint.modules.items():
            quantized = self._checkpoint.is_quantized(name)
            if quantized:
                yield name, "weight"
            suffixes = registry.format_module(module.match.format).SUFFIXES if quantized else ()
            yield from ((name, leaf) for leaf in module.parts if not (quantized and (leaf in suffixes or leaf == "weight")))

    def __iter__(self) -> Iterator[str]:
        return (f"{module}.{leaf}" if module else leaf for module, leaf in self._leaves())

    def __len__(self) -> int:
        return sum(1 for _ in self._leaves())

    def __getitem__(self, name: str) -> QuantizedTensor | Tensor:
        module, _, leaf = name.rpartition(".")
        if module not in self._checkpoint.modules or (module, leaf) not in set(self._leaves()):
            raise KeyError(name)
        return self._checkpoint.read(module, leaf=leaf)


def open_checkpoint(path: str | Path, allow_pickle: bool = False) -> Checkpoint:
    """Open what ``path`` is; ``BadFile`` or ``Unsupported`` if it is nothing we read.

    ``hf://org/name[@revision][/file]`` is a repository of the hub, as is a string ``org/name`` under which nothing lies here: its weights
    are read where they are (``qformats.hub``, ``RemoteError``).
    Files of ``torch.save`` are ``Unsafe('pickle')`` unless ``allow_pickle``; then they are read as data, and what asks for more than
    data is refused (the errors of ``qformats.containers.torch_zip``).
    """
    where, remote = Path(path), _remote(path)
    if remote is not None:
        opened: Checkpoint = remote[0].open_remote(remote[1], allow_pickle)
        return opened
    try:
        if where.is_dir():
            return _open_directory(where, allow_pickle)
        if not where.exists():
            raise BadFile("not-found", "no such file or directory", path=path, hint=_meant(where))
        with FileSource(where) as source:
            magic = source.pread(0, min(4, source.size))
        if magic in (b"GGUF", b"ggml", b"ggmf", b"ggjt", b"fmgg", b"tjgg") or where.suffix == ".gguf":
            return _open_gguf(where)
        if where.suffix in SUFFIXES:
            return _open_torch(where, allow_pickle)
        return _open_file(where)
    except QFormatError as error:
        error.locate(path=where)
        raise


def open_unwritten(path: Path, files: Mapping[str, ByteSource], unwritten: Unwritten) -> Checkpoint:
    """A checkpoint whose files are not on a disk: one GGUF, or safetensors with ``unwritten.small`` beside them; reads headers only."""
    (first, *rest) = files.values()
    if first.pread(0, 4) == b"GGUF":
        return replace(_gguf(path, open_gguf(first), first.name), unwritten=unwritten)
    opened = [open_safetensors(source) for source in (first, *rest)]
    raw = {name: tensor for file in opened for name, tensor in file.tensors.items()}
    metadata = {key: value for file in reversed(opened) for key, value in file.metadata.items()}

    def read(name: str) -> dict[str, Any]:
        return _parsed(unwritten.small[name], path) if name in unwritten.small else {}

    return replace(_with_config(path, read, raw, metadata, tuple(files)), unwritten=unwritten)


def _remote(path: str | Path) -> tuple[Any, Any] | None:
    """The module that opens what is no local path, and the address in its words."""
    text = path.as_posix() if isinstance(path, Path) else str(path)
    if not text.startswith(REMOTE_SCHEMES) and not (isinstance(path, str) and text.count("/") == 1 and not os.path.exists(path)):
        return None
    opener = import_module(REMOTE_OPENER)
    address = opener.find_address(path)
    return None if address is None else (opener, address)


def fetched(path: str | Path) -> Path:
    """``path``, or for an address the local copy of what it names, fetched into the client's cache."""
    remote = _remote(path)
    return Path(path) if remote is None else Path(remote[0].fetched(remote[1]))


def fetched_file(path: str | Path) -> Path:
    """``path``, or for the address of a file the local copy of this file alone; ``UsageError('hub-address')`` for a repository."""
    remote = _remote(path)
    return Path(path) if remote is None else Path(remote[0].fetched_file(remote[1]))


def fetched_beside(path: str | Path, wanted: tuple[str, ...]) -> str | Path:
    """``path``, or for an address whose repository has one of the ``wanted`` files the local directory of all but the weights."""
    remote = _remote(path)
    return path if remote is None else remote[0].fetched_beside(remote[1], wanted) or path


def fetched_config(path: str | Path) -> str | Path:
    """``path``, or for the address of a repository with a config.json the local directory of its small files, without the weights."""
    remote = _remote(path)
    return path if remote is None else remote[0].fetched_config(remote[1]) or path


def _meant(where: Path) -> str:
    """What to do about a path that does not exist: the name beside it, or the address that looks like it."""
    hint, words = near(where), where.parts
    words = words[2:] if words[:2] in (("https:", "huggingface.co"), ("http:", "huggingface.co")) else words
    if hint != "check the path" or len(words) < 2 or ":" in words[0] or Path(words[0]).exists():
        return hint
    return f"{hint}; a repository of the hub is written hf://{'/'.join(words)}"


def is_remote_path(path: str | Path) -> bool:
    """Whether ``path`` is an address and no local path."""
    return _remote(path) is not None


def small_names() -> tuple[str, ...]:
    """The small files that opening a directory may read."""
    return ("config.json", *_BESIDE)


def open_sources(path: Path, sources: Mapping[str, ByteSource]) -> Checkpoint:
    """Open files of weights that lie elsewhere as if they were those of ``path``: a directory with the small files, or a file in one.

    ``sources``: by file name; of a GGUF its shards.
    """
    if path.suffix == ".gguf":
        file = open_gguf_sources(list(sources.values()))
        return Checkpoint(path, "gguf", Match("gguf", {"container": "gguf"}), file.tensors, {}, file.metadata, tuple(sources), file)
    if path.name in sources and not path.is_dir():
        single = open_safetensors(sources[path.name])
        return _with_config(path, lambda name: _read_json(path.parent / name), single.tensors, single.metadata, (path.name,))
    found = open_directory(path, sources)
    return _with_config(path, lambda name: _read_json(path / name), found.tensors, found.metadata, tuple(found.files))


def open_found(path: Path, raw: Mapping[str, RawTensor], metadata: Mapping[str, str], files: tuple[str, ...]) -> Checkpoint:
    """The tensors ``raw`` of the safetensors ``files`` of a directory as its checkpoint, whatever its index says."""
    return _with_config(path, lambda name: _read_json(path / name), raw, metadata, files)


def pickle_refusal(where: object) -> Unsafe:
    """The error for files of ``torch.save`` that nobody allowed."""
    hint = "convert it to safetensors first, or add --allow-pickle (allow_pickle=True): it is then read without running anything"
    return Unsafe("pickle", "is a pickle, which can run code when it is loaded", path=where, hint=hint)


def _open_torch(where: Path, allow_pickle: bool) -> Checkpoint:
    """A file or a directory of ``torch.save``."""
    if not allow_pickle:
        raise pickle_refusal(where)
    allow = registry.pickled_classes()
    if where.is_dir():
        return _with_values(where, where, open_torch_directory(where, registry.pickle_files(), allow))
    return _with_values(where, where.parent, open_torch_file(where, allow))


def _with_values(where: Path, directory: Path, found: TorchSet) -> Checkpoint:
    config = _read_json(directory / "config.json")
    quantization, warnings = _quantization_config(directory, config, lambda name: _read_json(directory / name))
    raw, metadata = registry.flattened(found.value, quantization, str(where))
    match = replace(registry.detect(quantization, raw), metadata=metadata)
    said = (*warnings, *match.warnings)
    return Checkpoint(where, "torch", match, raw, config, metadata, found.files, None, said, found.sources)


def _open_gguf(where: Path) -> Checkpoint:
    return _gguf(where, open_gguf(where), where.name)


def _gguf(where: Path, file: GGUFFile, name: str) -> Checkpoint:
    match = Match("gguf", {"container": "gguf"})
    return Checkpoint(where, "gguf", match, file.tensors, {}, file.metadata, (name,), file)


def _open_file(where: Path) -> Checkpoint:
    file = open_safetensors(where)
    return _with_config(where, lambda name: _read_json(where.parent / name), file.tensors, file.metadata, (where.name,))


def _open_directory(where: Path, allow_pickle: bool) -> Checkpoint:
    gguf_files = sorted(where.glob("*.gguf"))
    has_safetensors = any(where.glob("*.safetensors"))
    if gguf_files and not has_safetensors:
        first = [f for f in gguf_files if "-of-" not in f.name or "-00001-of-" in f.name]
        if len(first) != 1:
            raise BadFile("several-gguf", f"holds {len(gguf_files)} GGUF files", path=where, hint="name one of them")
        return _open_gguf(first[0])
    if not has_safetensors and any(is_torch_name(entry.name) for entry in where.iterdir()):
        return _open_torch(where, allow_pickle)
    found = open_directory(where)
    return _with_config(where, lambda name: _read_json(where / name), found.tensors, found.metadata, tuple(found.files))


def _with_config(
    where: Path,
    read: Callable[[str], Mapping[str, Any]],
    raw: Mapping[str, RawTensor],
    metadata: Mapping[str, str],
    files: tuple[str, ...],
) -> Checkpoint:
    """``read`` gives the object in a JSON file beside the weights, ``{}`` where there is none."""
    config = read("config.json")
    quantization, warnings = _quantization_config(where, config, read)
    match = replace(registry.detect(quantization, raw), metadata=metadata)
    return Checkpoint(where, "safetensors", match, raw, config, metadata, files, None, (*warnings, *match.warnings))


def _quantization_config(
    where: Path, config: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    holders = [config, *(config[name] for name in ("text_config", "llm_config") if isinstance(config.get(name), dict))]
    inner = next((h[key] for h in holders for key in ("quantization_config", "compression_config") if h.get(key) is not None), None)
    if inner is None and isinstance(config.get("quantization"), dict):  # mlx-lm
        inner = config["quantization"]
    if inner is not None and not isinstance(inner, dict):
        raise BadFile("config-field", "quantization_config is not an object", path=_config_path(where))
    return registry.config_beside(inner, read)


def _config_path(where: Path) -> Path:
    return (where if where.is_dir() else where.parent) / "config.json"


def _read_json(path: Path) -> dict[str, Any]:
    return _parsed(_read_small(path), path) if path.is_file() else {}


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise BadFile("json", "is not valid JSON", path=path, hint="fetch the file again") from None
    if not isinstance(value, dict):
        raise BadFile("json", "is not a JSON object", path=path)
    return value


def _read_small(path: Path) -> bytes:
    with FileSource(path) as source:
        if source.size > _MAX_SIDE_NBYTES:
            raise BadFile("side-file-size", f"has {source.size} bytes, more than {_MAX_SIDE_NBYTES}", path=path)
        return source.pread(0, source.size)

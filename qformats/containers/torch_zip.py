"""Files of ``torch.save`` (``.bin``, ``.pt``, ``.pth``), read without PyTorch and without running anything they say. Torch-free.

The file is a zip of stored entries (``qformats.containers.stored_zip``) under one folder of any name (PyTorch 2.13,
``torch/serialization.py``):

| entry | content |
|-------|---------|
| ``NAME/data.pkl`` | the saved value, pickle protocol 2 (``qformats.containers.unpickle``) |
| ``NAME/data/KEY`` | the bytes of one storage |
| ``NAME/byteorder`` | ``little`` or ``big``; absent before PyTorch 2.1, then little |
| ``NAME/version``, ``.format_version``, ``.storage_alignment``, ``.data/serialization_id`` | not needed |

A storage is the persistent id ``("storage", TYPE, KEY, LOCATION, NUMEL)``; TYPE names a dtype (``torch FloatStorage``) or is
``torch.storage UntypedStorage``, whose NUMEL counts bytes. A tensor is a call of ``torch._utils._rebuild_tensor_v2(storage, offset, size,
stride, requires_grad, hooks[, metadata])``, offset and stride in elements, or ``_rebuild_tensor_v3`` with the dtype behind the hooks (all
dtypes since float8). Such a call makes a ``RawTensor`` over the file; views in another order than row-major are gathered when read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from qformats.containers.raw import RawTensor
from qformats.containers.source import ByteSource, FileSource, MemorySource
from qformats.containers.stored_zip import ZipEntry, read_stored_zip
from qformats.containers.strided import Gathered, StridedSource, is_overlapping, is_row_major
from qformats.containers.unpickle import MAX_PICKLE_NBYTES, Global, Record, Symbol, unpickle
from qformats.errors import BadFile, Unsafe, Unsupported

__all__ = ["DTYPES", "TorchFile", "encode", "flatten", "open_torch_zip"]

# torch's dtype word -> (the container's word, bytes of an element)
DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "int64": ("I64", 8), "int32": ("I32", 4),
    "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1), "uint16": ("U16", 2), "uint32": ("U32", 4),
    "uint64": ("U64", 8), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1), "float8_e8m0fnu": ("F8_E8M0", 1), "complex64": ("C64", 8), "float4_e2m1fn_x2": ("F4", 1),
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}  # fmt: skip
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_OTHER_DTYPES = (
    "complex32", "complex128", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "qint8", "qint32", "quint8", "quint4x2", "quint2x4",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
)  # fmt: skip
_OTHER_CONSTANTS = (
    "strided", "sparse_coo", "contiguous_format", "channels_last", "preserve_format", "per_tensor_affine", "per_tensor_symmetric",
    "per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams",
)  # fmt: skip
_OTHER_STORAGES = ("ComplexDoubleStorage", "QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage")
_NOT_PLAIN = {
    "_rebuild_sparse_tensor": "sparse", "_rebuild_qtensor": "of PyTorch's own quantized kind", "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "on the meta device: it has no values", "_rebuild_device_tensor_from_numpy": "saved through numpy",
}  # fmt: skip
_PLAIN_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch._tensor.Tensor")
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**62
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # 0x1950a86a20f9469cfc6c, torch/serialization.py
_OTHER_ARCHIVES = {b"7z\xbc\xaf'\x1c": "a 7z archive", b"\x1f\x8b": "compressed with gzip", b"\x28\xb5\x2f\xfd": "compressed with zstd"}


@dataclass(frozen=True)
class TorchFile:
    """An open file: its value (plain Python, ``RawTensor``, ``Symbol``, ``Record``) and where the bytes of its tensors are."""

    name: str
    value: Any
    source: ByteSource


@dataclass(frozen=True, slots=True)
class _Storage:
    """The bytes of one storage; ``dtype`` None if it is untyped."""

    dtype: str | None
    offset: int
    nbytes: int


def open_torch_zip(path: str | Path | ByteSource, allow: Iterable[str] = ()) -> TorchFile:
    """Read the value of a file of ``torch.save``; classes whose dotted names are in ``allow`` become inert ``Record`` values.

    Raises what ``read_stored_zip`` and ``unpickle`` raise, ``Unsupported`` (``torch-legacy``, ``torch-script``, ``torch-byteorder``,
    ``torch-dtype``, ``torch-tensor``, ``torch-stride``) and ``BadFile`` (``torch-archive``, ``torch-storage``, ``torch-shape``).
    """
    source: ByteSource = FileSource(path) if isinstance(path, (str, Path)) else path
    _check_kind(source)
    entries = read_stored_zip(source)
    folder = _folder(source, entries)
    _check_byteorder(source, entries.get(f"{folder}/byteorder"))
    pickled = entries[f"{folder}/data.pkl"]
    if pickled.nbytes > MAX_PICKLE_NBYTES:
        message = f"data.pkl has {pickled.nbytes} bytes, at most {MAX_PICKLE_NBYTES} are read"
        raise Unsafe("pickle-limit", message, path=source.name)
    reader = _Reader(source, entries, folder, frozenset(allow))
    data = source.pread(pickled.offset, pickled.nbytes)
    value = unpickle(data, globals_=reader.find, persistent=reader.storage, name=source.name)
    return TorchFile(source.name, value, source)


def _check_kind(source: ByteSource) -> None:
    """Say by name what a file is that other readers of ``.bin`` and ``.pt`` would take."""
    head = source.pread(0, min(source.size, 512))
    hint = "load it with the PyTorch that wrote it, in a place of no value, and save it as safetensors"
    if _LEGACY_MAGIC in head[:32]:
        raise Unsupported("torch-legacy", "is in PyTorch's format before 1.6, not a zip", path=source.name, hint=hint)
    if head[257:262] == b"ustar":
        raise Unsupported("torch-legacy", "is a tar archive of PyTorch before 0.1.10", path=source.name, hint=hint)
    if head[:1] == b"\x80":
        raise Unsupported("torch-legacy", "is a bare pickle, not a zip of torch.save", path=source.name, hint=hint)
    for magic, word in _OTHER_ARCHIVES.items():
        if head.startswith(magic):
            raise Unsupported("torch-legacy", f"is {word}, not a zip of torch.save", path=source.name, hint="unpack it first")


def _folder(source: ByteSource, entries: Mapping[str, ZipEntry]) -> str:
    """The one folder that everything is in."""
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1:
        message = f"holds {len(folders)} folders, expected one"
        raise BadFile("torch-archive", message, path=source.name, hint="this is no file of torch.save")
    folder = folders.pop()
    if f"{folder}/constants.pkl" in entries or any(name.startswith(f"{folder}/code/") for name in entries):
        raise Unsupported("torch-script", "is a TorchScript program, not a checkpoint", path=source.name, hint="save its state_dict")
    pickles = [name for name in entries if name.endswith(".pkl")]
    if pickles != [f"{folder}/data.pkl"]:
        raise BadFile("torch-archive", f"holds {len(pickles)} pickles, expected {folder}/data.pkl alone", path=source.name)
    return folder


def _check_byteorder(source: ByteSource, entry: ZipEntry | None) -> None:
    word = b"little" if entry is None else source.pread(entry.offset, min(entry.nbytes, 16))
    if word == b"big":
        raise Unsupported("torch-byteorder", "was saved on a big-endian machine", path=source.name, hint="save it again on another one")
    if word != b"little":
        raise BadFile("torch-archive", f"has the byte order {word!r}, expected little", path=source.name)


# ---------------------------------------------------------------- what a pickle may name


class _Reader:
    """What the names and persistent ids of one file mean."""

    def __init__(self, source: ByteSource, entries: Mapping[str, ZipEntry], folder: str, allow: frozenset[str]) -> None:
        self._source, self._entries, self._folder, self._allow = source, entries, folder, allow
        self._storages: dict[str, _Storage] = {}
        self._held = Gathered()
        calls: dict[str, Callable[[tuple[Any, ...]], Any]] = {
            "torch._utils._rebuild_tensor": self._tensor_v1,
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
            "torch._utils._rebuild_wrapper_subclass": self._wrapper,
            "torch._tensor._rebuild_from_type_v2": self._from_type,
            "torch._tensor._rebuild_from_type": self._from_type,
            "torch.tensor._rebuild_from_type": self._from_type,
            "torch.Size": _size,
            "torch.device": _device,
            "torch.serialization._get_layout": _layout,
            "collections.OrderedDict": _ordered,
            "_codecs.encode": _bytes,
            **{f"torch._utils.{name}": _refusal(word) for name, word in _NOT_PLAIN.items()},
            **{f"{module}.{name}": kind for module in ("builtins", "__builtin__") for name, kind in _BUILTINS.items()},
        }
        self._calls = calls

    def find(self, path: str) -> Global | None:
        """What a dotted name means, None if it is not part of a checkpoint."""
        symbol = Symbol(path)
        if path in self._calls:
            return Global(symbol, self._calls[path])
        if path in self._allow:
            return Global(symbol, lambda args: Record(path, args), is_class=True)
        constants = (*DTYPES, *_OTHER_DTYPES, *_OTHER_CONSTANTS, *_STORAGES, *_OTHER_STORAGES)
        if path in (*_PLAIN_TYPES, *_UNTYPED) or (path.removeprefix("torch.") in constants and path.startswith("torch.")):
            return Global(symbol)
        return None

    def storage(self, saved: Any) -> _Storage:
        """The storage of a persistent id, its size held against its entry."""
        if type(saved) is not tuple or len(saved) != 5 or saved[0] != "storage":
            raise BadFile("torch-storage", f"the persistent id is a {type(saved).__name__}, expected a storage and four facts")
        _, kind, key, _, count = saved
        if not isinstance(kind, Symbol) or type(key) is not str or type(count) is not int or count < 0:
            raise BadFile("torch-storage", "the persistent id of a storage has the wrong types")
        dtype, itemsize = _storage_type(kind)
        entry = self._entries.get(f"{self._folder}/data/{key}")
        if entry is None:
            raise BadFile("torch-storage", f"there is no entry data/{key[:80]}")
        if not 0 <= entry.nbytes - count * itemsize < itemsize:
            raise BadFile("torch-storage", f"storage {key} has {entry.nbytes} bytes, {count} elements need {count * itemsize}")
        found = _Storage(dtype, entry.offset, count * itemsize)
        if self._storages.setdefault(key, found) != found:
            raise BadFile("torch-storage", f"storage {key} is named with two types or sizes")
        return found

    # ------------------------------------------------------------ tensors

    def _tensor_v1(self, args: tuple[Any, ...]) -> RawTensor:
        storage, offset, size, stride = _exactly(args, 4, 4)
        return self._tensor(storage, offset, size, stride, None)

    def _tensor_v2(self, args: tuple[Any, ...]) -> RawTensor:
        storage, offset, size, stride, _, _, *metadata = _exactly(args, 6, 7)
        _check_metadata(metadata)
        return self._tensor(storage, offset, size, stride, None)

    def _tensor_v3(self, args: tuple[Any, ...]) -> RawTensor:
        storage, offset, size, stride, _, _, dtype, *metadata = _exactly(args, 7, 8)
        _check_metadata(metadata)
        if not isinstance(dtype, Symbol):
            raise BadFile("torch-shape", f"the dtype of a tensor is a {type(dtype).__name__}")
        return self._tensor(storage, offset, size, stride, dtype.path)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None) -> RawTensor:
        """A window on a storage; every element must lie in it."""
        if not isinstance(storage, _Storage):
            raise BadFile("torch-storage", f"a tensor is made of a {type(storage).__name__}, expected a storage")
        word, itemsize = _dtype(f"torch.{storage.dtype or 'uint8'}" if dtype is None else dtype)
        shape, strides = _sizes(size, "size"), _sizes(stride, "stride")
        if type(offset) is not int or offset < 0 or len(shape) != len(strides):
            raise BadFile("torch-shape", f"a tensor has {len(shape)} sizes, {len(strides)} strides and the offset {str(offset)[:40]}")
        count = prod(shape)
        end = offset + (1 + sum((n - 1) * step for n, step in zip(shape, strides)) if count else 0)
        if end * itemsize > storage.nbytes or count > MAX_ELEMENTS:
            message = f"a tensor of shape {shape[:8]} with strides {strides[:8]} ends at element {end}"
            raise BadFile("torch-shape", f"{message}, its storage has {storage.nbytes // itemsize}")
        at, nbytes = storage.offset + offset * itemsize, count * itemsize
        if is_row_major(shape, strides):
            return RawTensor("", word, _stored_shape(word, shape), self._source, at, nbytes)
        if is_overlapping(shape, strides) or word == "F4":
            hint = "call .contiguous() on it before saving"
            raise Unsupported("torch-stride", f"a tensor of shape {shape} has the strides {strides}, which are no order of it", hint=hint)
        return RawTensor("", word, shape, StridedSource(self._source, at, itemsize, shape, strides, self._held), 0, nbytes)

    # ------------------------------------------------------------ subclasses

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        """A tensor of a subclass: the tensor alone for PyTorch's own classes, else a record of the allowed class."""
        function, kind, inner, state = _exactly(args, 4, 4)
        if not isinstance(function, Symbol) or not isinstance(kind, Symbol) or type(inner) is not tuple:
            raise BadFile("pickle-value", "a tensor of a subclass is not made of a function, a class and arguments")
        if function.path not in self._calls or not function.path.startswith("torch._utils._rebuild_"):
            raise Unsafe("pickle-call", f"a tensor is made by {function.path!r}")
        base = self._calls[function.path](inner)
        if kind.path in _PLAIN_TYPES:
            return base
        if kind.path not in self._allow:
            raise Unsafe("pickle-global", f"a tensor is of the class {kind.path!r}, which is not part of a checkpoint")
        if isinstance(base, Record) and base.class_name == kind.path:
            return Record(kind.path, base.args, state)
        return Record(kind.path, (base,), state)

    def _wrapper(self, args: tuple[Any, ...]) -> Record:
        kind = _exactly(args, 8, 8)[0]
        if not isinstance(kind, Symbol) or kind.path not in self._allow:
            word = kind.path if isinstance(kind, Symbol) else type(kind).__name__
            raise Unsafe("pickle-global", f"a tensor is of the class {word!r}, which is not part of a checkpoint")
        return Record(kind.path, args[1:])


def _storage_type(kind: Symbol) -> tuple[str | None, int]:
    """The dtype word of a storage class (None: untyped) and the bytes of its element."""
    if kind.path in _UNTYPED:
        return None, 1
    dtype = _STORAGES.get(kind.path.removeprefix("torch."))
    if dtype is None:
        if kind.path.removeprefix("torch.") in _OTHER_STORAGES:
            raise Unsupported("torch-dtype", f"storages of {kind.path} are not read")
        raise BadFile("torch-storage", f"{kind.path} is no kind of storage")
    return dtype, DTYPES[dtype][1]


def _dtype(path: str) -> tuple[str, int]:
    found = DTYPES.get(path.removeprefix("torch."))
    if found is None:
        raise Unsupported("torch-dtype", f"tensors of {path} are not read", hint=f"known: {', '.join(DTYPES)}")
    return found


def _stored_shape(word: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the container's own elements: two 4-bit floats in one byte count as two, as in safetensors."""
    return (*shape[:-1], shape[-1] * 2) if word == "F4" and shape else shape


def _sizes(value: Any, word: str) -> tuple[int, ...]:
    if type(value) not in (tuple, list) or len(value) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in value):
        raise BadFile("torch-shape", f"the {word} of a tensor is no tuple of sizes")
    return tuple(value)


def _exactly(args: tuple[Any, ...], least: int, most: int) -> tuple[Any, ...]:
    if not least <= len(args) <= most:
        raise BadFile("pickle-value", f"a tensor is made of {len(args)} arguments, expected {least}")
    return args


def _check_metadata(metadata: Sequence[Any]) -> None:
    """Bits that change what the numbers mean (conjugate, negative) are refused."""
    found = metadata[0] if metadata else None
    if found is not None and (type(found) is not dict or any(value is not False for value in found.values())):
        raise Unsupported("torch-tensor", "a tensor is saved with its conjugate or negative bit", hint="call .resolve_neg() first")


# ---------------------------------------------------------------- other calls


def _parameter(args: tuple[Any, ...]) -> Any:
    """A parameter is its tensor."""
    if not args or not isinstance(args[0], (RawTensor, Record)):
        raise BadFile("pickle-value", "a parameter is made of something else than a tensor")
    return args[0]


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    return _sizes(_exactly(args, 1, 1)[0], "size")


def _device(args: tuple[Any, ...]) -> Record:
    if not 1 <= len(args) <= 2 or type(args[0]) is not str or any(type(index) is not int for index in args[1:]):
        raise BadFile("pickle-value", "a device is not made of a name and a number")
    return Record("torch.device", args)


def _layout(args: tuple[Any, ...]) -> Symbol:
    name = _exactly(args, 1, 1)[0]
    if type(name) is not str or name.removeprefix("torch.") not in _OTHER_CONSTANTS:
        raise BadFile("pickle-value", "names a layout that does not exist")
    return Symbol(name)


def _ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
    if args:
        raise BadFile("pickle-value", "an ordered dict is made with arguments")
    return {}


def _bytes(args: tuple[Any, ...]) -> bytes:
    """Protocol 2 writes bytes as text of one character a byte."""
    if len(args) != 2 or type(args[0]) is not str or args[1] not in ("latin1", "latin-1"):
        raise BadFile("pickle-value", "bytes are not made of text and latin1")
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError:
        raise BadFile("pickle-value", "bytes are made of wider characters") from None


def _plain_set(args: tuple[Any, ...]) -> set[Any]:
    items = args[0] if args else []
    if len(args) > 1 or type(items) is not list or not all(type(item) in (str, int) for item in items):
        raise BadFile("pickle-value", "a set is not made of a list of texts and numbers")
    return set(items)


def _plain_bytes(args: tuple[Any, ...]) -> bytes:
    if args and (len(args) > 1 or type(args[0]) is not bytes):
        raise BadFile("pickle-value", "bytes are made of something else")
    return args[0] if args else b""


_BUILTINS: dict[str, Callable[[tuple[Any, ...]], Any]] = {"set": _plain_set, "bytes": _plain_bytes, "bytearray": _plain_bytes}


def _refusal(word: str) -> Callable[[tuple[Any, ...]], Any]:
    def refuse(_: tuple[Any, ...]) -> Any:
        raise Unsupported("torch-tensor", f"holds a tensor that is {word}", hint="save it as a dense tensor")

    return refuse


# ---------------------------------------------------------------- flattening


def flatten(value: Any, name: str = "", prefix: str = "") -> dict[str, RawTensor]:
    """A value of nested dicts as tensors by full name: keys joined by dots, other plain values by ``encode``, ``None`` left out.

    ``{"state_dict": {…}}`` counts as what it holds. Raises ``BadFile('torch-value')`` for other values, ``BadFile('duplicate-tensor')``
    where two keys join to one name.
    """
    if not prefix and type(value) is dict and type(value.get("state_dict")) is dict:
        value = value["state_dict"]
    if type(value) is not dict:
        word = value.class_name if isinstance(value, Record) else type(value).__name__
        raise BadFile("torch-value", f"holds a {word}, expected a dict of tensors", path=name, hint="save the model's state_dict()")
    result: dict[str, RawTensor] = {}
    for key, item in value.items():
        full = f"{prefix}{key}"
        found = flatten(item, name, f"{full}.") if type(item) is dict else {} if item is None else {full: encode(full, item, name)}
        for inner, raw in found.items():
            if inner in result:
                raise BadFile("duplicate-tensor", "is there twice, once as a nested key", path=name, tensor=inner)
            result[inner] = raw
    return result


def encode(name: str, value: Any, path: str | None = None) -> RawTensor:
    """A plain value as a tensor: ``bool`` a BOOL, ``int`` an I64, ``float`` an F64 of shape (), text and the names of symbols and devices
    U8 of their UTF-8, ``bytes`` U8, a list or tuple of ints I64 (n,). A tensor is itself. ``BadFile('torch-value')`` for the rest.
    """
    if isinstance(value, RawTensor):
        return replace(value, name=name)
    raw = _encoded(value)
    if raw is None:
        found = value.class_name if isinstance(value, Record) else type(value).__name__
        raise BadFile("torch-value", f"is a {found}, expected a tensor, a number or text", path=path, tensor=name)
    dtype, shape, data = raw
    return RawTensor(name, dtype, shape, MemorySource(data, name), 0, len(data))


def _encoded(value: Any) -> tuple[str, tuple[int, ...], bytes] | None:
    """Dtype word, shape and bytes of a plain value."""
    if isinstance(value, Record) and value.class_name == "torch.device":
        value = ":".join(str(part) for part in value.args)
    if isinstance(value, Symbol):
        value = value.path
    if type(value) is bool:
        return "BOOL", (), bytes([value])
    if type(value) is int and -(2**63) <= value < 2**63:
        return "I64", (), value.to_bytes(8, "little", signed=True)
    if type(value) is float:
        return "F64", (), struct.pack("<d", value)
    if type(value) in (str, bytes):
        data = value.encode("utf-8") if type(value) is str else value
        return "U8", (len(data),), data
    if type(value) in (list, tuple) and all(type(n) is int and -(2**63) <= n < 2**63 for n in value):
        return "I64", (len(value),), b"".join(n.to_bytes(8, "little", signed=True) for n in value)
    return None

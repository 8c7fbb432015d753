"""What every format module provides, and the small values that pass between formats, checkpoint and planner. Torch-free.

A format is a module (or package) with these names; the registry holds one row for each and imports it only when needed:

- ``NAME``: users' word (``"awq"``). ``SUFFIXES``: leaf names it owns beside ``bias`` (``{"qweight", "qzeros", "scales", "g_idx"}``).
- ``detect(config, names) -> Match | None``: from the quantization config (``{}`` if there is none) and the tensor names only.
- ``scheme(module) -> Scheme``: from headers only; checks companions, dtypes and shapes (``BadFile``), refuses unknown variants
  by name (``Unsupported``). ``module.match`` carries the config.
- ``read(module, start=0, stop=None, *, codes=True) -> QuantizedTensor``: output rows ``start:stop`` (any range), codes in logical
  order (N, K). With ``codes=False`` only the parameters are read and the codes are a zero-stride plane of zeros.
- ``storages(target, scheme) -> list[Storage]``: the types of ``target`` that could hold a weight shaped like ``scheme``
  (best-effort candidates; ``reencode`` decides what fits). Refuses unknown type names and options (``UsageError``).
- ``layout(storage, shape) -> dict[leaf, PartInfo]``: the parts a weight of ``shape`` becomes; sizes follow from it.
- ``write(storage, tensor, start, shape) -> list[Piece]``: rows ``start : start + n`` of the whole weight ``shape`` as pieces of parts.
  ``tensor`` is exactly in the storage's form (same grid, one scale plane a group, constant or per-group zero point).
- ``config_out(target, modules, skipped, original) -> dict``: the quantization config; ``modules`` maps module name to its Storage,
  ``skipped`` lists linear modules left dense, ``original`` is the config of the same format from a provenance record, or None.
- ``can_store(storage, scheme) -> Yes | No``: whether ``write`` takes such a tensor as it stands.

What a format may have beside, where it needs it:

- ``storage_of(module) -> Storage``: the storage that ``write`` would make these very parts of.
- ``renewed(storage) -> Storage``: that storage for other codes of the same kind, where it holds what is true of these alone.
- ``holds_codes(parts) -> bool``: whether these parts of a module are a weight in codes, where the presence of a suffix does not tell.
- ``GLUED``: suffixes that follow a module's name without a dot; ``split_name(stored) -> (module, leaf)`` and its inverse
  ``join_name(module, leaf)`` where names have other ways. With ``""`` among them a weight may bear its module's own name. A suffix
  may hold dots (``weight.absmax``).
- ``EXTRAS``: leaves beside the weight that are no weights (``input_scale``, ``k_scale``): copied within the format. Into another one go
  the scales of a cache (``CACHE``) where both have them, and those that ``INPUT_SCALES`` of both name; the rest is named as dropped.
  ``WRITTEN``: those of them that its own ``write`` makes beside every weight.
- ``activations(config) -> Activations | None``: how the model rounds what enters its linear layers while it runs.
  ``INPUT_SCALES``: for a kind of activations the leaves that hold a static scale, the one to write first, and whether it divides;
  ``INPUT_SCALE_SHAPE``: the shape of one. ``with_activations(config, activations, cache) -> dict | None``: the config of an output with
  these activations in it, None where it has no words for them; ``cache``: scales of a cache are there. A format without these hooks
  holds weights alone.
- ``inputs(module) -> Inputs | None``: how the linear layer with this weight rounds its inputs while it runs, scales included;
  ``outputs(module) -> Inputs | None``: and its results, bias added.
- ``NEEDS_COLUMNS = True``: its parts do not say in_features; modules come with ``columns``.
- ``GROUPS``: smaller groups for new codes, largest first, where the default one does not divide every width of a model.
- ``NEEDS_DTYPE = True``: its owner computes only in the dtype of the scales; ``storages`` gets a target with the model's ``dtype``.
- ``config_beside(config, files) -> (config, warnings)``: the quantization config out of config.json's and the row's ``configs``.
- ``side_files(config) -> dict[name, bytes]``: small files to write beside the weights. ``CONFIG_INSIDE = False``: its config is in these
  alone, config.json has no ``quantization_config``.
- ``metadata_out(modules, tensors) -> dict[str, str]``: more ``__metadata__`` of the safetensors files; ``modules`` maps module name to
  (Storage, shape of the weight), ``tensors`` the names of all others to their dtypes.
- ``loading_warnings(storages) -> list[str]``: what its owner's own loader does not load of weights written in these storages (by module).
- ``module_warnings(module)``, ``harmonize(storages)``: see ``converters.plan``. ``PACKED_EXPERTS``: it holds stacked experts alone.
  ``STACKS``: why it has no codes for them, where there is more to say of it.
- ``stacks(target, scheme) -> bool``: whether such a target (``scheme``: of the source's codes where it names no type) holds experts
  stacked in one tensor with outputs as rows, as transformers 5 has them in memory (``Stacks``); ``STACKS`` speaks of the others.
- ``ONE_TYPE = True``: all weights of a checkpoint are of one type and group size. ``embeddings(target, scheme)
  -> bool``: whether the loaders of such a target read an embedding in such codes (False where it is absent).
- ``BARE``: suffixes of a weight that is a parameter, not a module, and bears its module's whole name where it is floats (stacked experts).
  ``KEEPS_AXES = True``: codes have the rows of their floats, inputs too; else outputs are rows whatever the floats have.
  ``CONV1D = True``: its owner quantizes transformers' ``Conv1D`` (GPT-2), as (N, K) like any other matrix.

Checkpoints of ``torch.save`` (read only with ``allow_pickle``) reach a format as raw tensors by full name, like any other. A format whose
pickles hold more than a plain state dict may add:

- ``PICKLED_CLASSES``: dotted names of classes (enums and functions too) that its pickles name. They are never imported: each becomes a
  ``Record(class_name, args, state)`` of ``qformats.containers.unpickle``; all other classes are ``Unsafe('pickle-global')``.
- ``PICKLE_FILES``: names of files that are its own (``("qmodel.pt",)``), looked for where there is no ``pytorch_model.bin``.
- ``flatten(value, config) -> Mapping[str, RawTensor] | None``: the tensors of such a value (plain Python, ``RawTensor``, ``Symbol`` for
  dtypes, ``Record``; ``config`` is the quantization config or ``{}``), None if the value is not its kind. Facts that are no tensors become
  tiny tensors with ``encode(name, value)`` of ``qformats.containers.torch_zip``, so that ``scheme`` and ``read`` find them among
  ``module.parts`` (their leaves belong in ``SUFFIXES``). Without it, nested dicts are joined by dots and every plain value is encoded so:
  numbers as BOOL, I64 or F64 of shape (), text, dtypes and devices as U8 (n,), sizes as I64 (n,); ``None`` is left out. A pair of such
  a mapping and a ``dict[str, str]`` gives ``Match.metadata`` too, for formats that have it in safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from qformats.containers.raw import RawTensor

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CACHE", "Activations", "Match", "Module", "PartInfo", "Piece", "Target"]

CACHE = frozenset({"k_scale", "v_scale"})  # leaves that all formats with scales of a cache of keys and values share


@dataclass(frozen=True, slots=True)
class Activations:
    """How inputs of linear layers are rounded: ``kind`` is the type's word (``fp8``, ``int8``, ``nvfp4``), ``per`` what has one scale."""

    kind: str
    dynamic: bool
    per: str = "tensor"

    def __str__(self) -> str:
        return f"{self.kind} ({'dynamic' if self.dynamic else 'static'}, per {self.per})"


@dataclass(frozen=True, slots=True)
class Inputs:
    """How one linear layer rounds what enters it, number by number.

    ``grid``: integers (``int8``) or a small float (``e4m3fn``, ``e5m2``, ``e2m1``). ``per``: what has one scale, ``tensor``, ``token`` (a
    row of columns) or ``group`` (``group`` columns of one). A dynamic scale is the largest magnitude of these, at most ``most``, over
    ``span`` (without ``symmetric``: the distance from the smallest, or 0, to the largest, or 0, over ``span``), and at least ``least``.
    ``scale``: a static one, with ``zero`` as its zero point; beside a ``scale_grid`` the factor that the scales of groups stand under
    (``inverse``: that they are divided by; ``factored``: found of the whole tensor, the largest magnitude over the largest that these
    two grids have). ``least`` is then that of a group's rounded scale. ``scale_grid``: what a group's scale is rounded to: ``e4m3fn``,
    or a power of two, of the largest magnitude under the grid's largest power (``floor``; ``even``: rounded to the grid's digits first)
    or not under the scale itself (``ceil``). ``reciprocal``: inputs are multiplied by one over the scale, not divided by it.
    ``highest``: the last integer, -``highest`` - 1 the first. ``outliers``: columns with a magnitude of at least this stay as they are
    (0: none do). ``steps``: the dtype that inputs are cast to first, the rest is in float32; ``""``: all is computed in theirs.
    """

    grid: str
    per: str = "token"
    group: int = 0
    scale: float | None = None
    zero: float = 0.0
    symmetric: bool = True
    span: float = 127.0
    least: float = 0.0
    most: float | None = None
    scale_grid: str = ""
    inverse: bool = False
    factored: bool = False
    reciprocal: bool = False
    highest: int = 127
    outliers: float = 0.0
    steps: str = "float32"


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Match:
    """A detected format: ``dialect`` names a spelling of it (``"auto-round"``), ``config`` is the checkpoint's own dict, verbatim.

    ``metadata``: the ``__metadata__`` of the safetensors files, for formats that say there what a tensor is.
    ``options``: what the user says of the source where a file does not tell (``zero-points=v2``), by the names in its registry row.
    """

    format: str
    config: Mapping[str, Any]
    dialect: str = ""
    warnings: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Module:
    """One module of a checkpoint: its raw parts by leaf name (``qweight``, ``weight``, ``bias`` …).

    ``memo`` is the format's own: small facts about these very parts that every row range would find out again. ``columns``: in_features
    as the model's architecture has it, for a format that asks (``NEEDS_COLUMNS``); None where that is not known.
    """

    name: str
    parts: Mapping[str, RawTensor]
    match: Match
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    columns: int | None = None

    def remember(self, key: str, find: Callable[[Module], _T]) -> _T:
        """What ``find`` finds of this module: looked for once, then kept in ``memo``."""
        if key not in self.memo:
            self.memo[key] = find(self)
        found: _T = self.memo[key]
        return found


@dataclass(frozen=True, slots=True)
class PartInfo:
    """A stored part: the container's dtype word and its row-major shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a part: ``array`` goes to rows ``row : row + array.shape[0]`` and columns ``column : …`` of the part seen as 2-D.

    For block types (GGUF) ``array`` is uint8 (rows, row bytes) and ``column`` 0.
    """

    leaf: str
    array: np.ndarray[Any, Any]
    row: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed ``FORMAT[:TYPE][,key=value…]``. ``dtype``: the model's (torch's word), for a format that asks (``NEEDS_DTYPE``).

    ``inputs``: how the source rounds what enters its linear layers.
    """

    format: str
    type: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    inputs: Activations | None = None

    def __str__(self) -> str:
        pairs = "".join(f",{k}={v}" if v else f",{k}" for k, v in self.options.items())
        return f"{self.format}{':' + self.type if self.type else ''}{pairs}"

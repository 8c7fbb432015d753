"""What is rounded while a model runs: static scales that go along into another format, and words where a scheme is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from converters.jobs import Job
from qformats import registry
from qformats.architectures.mapping import SourceRows, TensorMap
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import RawTensor
from qformats.formats.protocol import CACHE, Activations, PartInfo

__all__ = ["configured", "extra_job", "moved", "scheme_of", "settled"]

_Scales = tuple[tuple[str, ...], bool]


def scheme_of(checkpoint: Checkpoint) -> Activations | None:
    """How the source rounds the inputs of its linear layers, as its config says."""
    hook = getattr(registry.format_module(checkpoint.format), "activations", None)
    found: Activations | None = hook(checkpoint.match.config) if hook is not None and checkpoint.match.config else None
    return found


def _scales(form: str, kind: str) -> _Scales | None:
    """The leaves of a format that hold a static scale of ``kind``, and whether it divides."""
    found: _Scales | None = getattr(registry.format_module(form), "INPUT_SCALES", {}).get(kind)
    return found


def moved(checkpoint: Checkpoint, target: str, module: str, leaf: str) -> TensorMap | None:
    """Where a tensor that is no weight goes in another format; None where it has no place."""
    parts = checkpoint.modules[module].parts
    raw, source = parts[leaf], SourceRows(module, leaf, 0, parts[leaf].rows)
    form = registry.format_module(target)
    if leaf in CACHE & getattr(form, "EXTRAS", frozenset()):
        return TensorMap(module, leaf, raw.shape, (source,), kind="extra")
    scheme = scheme_of(checkpoint)
    if scheme is None or scheme.dynamic or prod(raw.shape) != 1 or raw.dtype not in ("F32", "BF16", "F16"):
        return None
    mine, theirs = _scales(checkpoint.format, scheme.kind), _scales(target, scheme.kind)
    if mine is None or theirs is None or leaf != next((name for name in mine[0] if name in parts), None):
        return None
    return TensorMap(module, theirs[0][0], form.INPUT_SCALE_SHAPE, (source,), kind="extra")


def extra_job(checkpoint: Checkpoint, tensor: TensorMap, target: str) -> Job:
    """A tensor that is no weight: the same bytes, or a scale of the inputs as the target has it."""
    source = tensor.sources[0]
    raw, scheme = checkpoint.modules[source.module].parts[source.leaf], scheme_of(checkpoint)
    mine, theirs = (None if scheme is None else _scales(name, scheme.kind) for name in (checkpoint.format, target))
    turned = mine is not None and theirs is not None and source.leaf in mine[0] and mine[1] != theirs[1]
    if not turned and source.leaf == tensor.leaf and raw.shape == tensor.shape:
        part = {tensor.leaf: PartInfo(raw.dtype, raw.shape)}
        return Job(tensor, "parts", "copied", "the same bytes", raw.dtype, part, True, format=checkpoint.format)
    if not turned:
        part, why = {tensor.leaf: PartInfo(raw.dtype, tensor.shape)}, "the scale of the inputs under its name there"
        return Job(tensor, "parts", "exact", why, raw.dtype, part, True, format=target, content={tensor.leaf: bytes(raw.read())})
    data, exact = _reciprocal(raw)
    why = f"the reciprocal of the inputs' scale{'' if exact else ', rounded to float32 (relative 2^-24)'}"
    part = {tensor.leaf: PartInfo("F32", tensor.shape)}
    kind = "exact" if exact else "codes-exact"
    return Job(tensor, "parts", kind, why, "F32", part, exact, format=target, content={tensor.leaf: data})


def _reciprocal(raw: RawTensor) -> tuple[bytes, bool]:
    """1 / the one number of ``raw`` as float32, and whether it is that."""
    import numpy as np

    from qformats.formats.packed import float_tensor

    value = float(float_tensor(raw.array().reshape(1, 1), raw.dtype))
    made = np.float32(1 / value) if value else np.float32(0)
    return made.tobytes(), float(made) * value == 1


def configured(
    checkpoint: Checkpoint, target: str, jobs: Sequence[Job], config: Mapping[str, Any], original: Mapping[str, Any] | None
) -> tuple[dict[str, Any], bool]:
    """The quantization config of an output with the source's activations and cache, and whether it has these activations.

    The original itself says what it says.
    """
    scheme = scheme_of(checkpoint)
    hook = getattr(registry.format_module(target), "with_activations", None)
    if (original is not None and dict(config) == dict(original)) or hook is None:
        return dict(config), hook is not None or scheme is None
    cache = any(job.map.kind == "extra" and job.map.leaf in CACHE for job in jobs)
    made = hook(config, scheme, cache)
    return (made, True) if made is not None else (hook(config, None, cache), False)


def settled(checkpoint: Checkpoint, target: str, jobs: Sequence[Job], carried: bool) -> tuple[list[Job], dict[str, str], list[str]]:
    """The jobs without the scales that their weights or the config no longer go with; what was dropped, and a warning.

    ``carried``: whether the config of the output has the activations.
    """
    scheme = scheme_of(checkpoint)
    if scheme is None:
        return list(jobs), {}, []
    weights = {job.map.target: job for job in jobs if job.map.leaf == "weight"}
    found = _scales(target, scheme.kind)
    leaves = {leaf for name in (checkpoint.format, target) if (held := _scales(name, scheme.kind)) for leaf in held[0]}
    gone: dict[str, str] = {}
    for job in jobs:
        weight = weights.get(job.map.target)
        if job.map.kind != "extra" or not job.map.sources or job.map.leaf not in leaves or weight is None:
            continue
        fits = weight.action == "parts" or (weight.storage is not None and weight.storage.type == scheme.kind)
        if found is None or not carried or not fits:
            gone[job.name] = f"is the scale of {scheme.kind} inputs, beside a weight in {weight.type}"
    text = f"inputs of its linear layers are rounded to {scheme} while it runs: {target} gets the weights alone"
    return [job for job in jobs if job.name not in gone], gone, [] if carried else [text]

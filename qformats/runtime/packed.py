"""What all modules with packed weights share: planes as buffers, products with them, and a ``weight`` that stands for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map

from qformats.errors import Unsupported
from qformats.kernels import dispatch
from qformats.kernels.cpu import Straight, straight
from qformats.kernels.lower import Lowered, raised
from qformats.runtime.anew import Kept, Stretch, requantized
from qformats.runtime.inputs import round_inputs
from qformats.runtime.state import Source, fill
from qformats.tensor import QuantizedTensor

__all__ = ["Packed", "PackedWeight", "present", "refuse_another"]

_OWN_OP = torch.ops.aten.detach.default


class PackedWeight(torch.Tensor):
    """Stands for the floats of a module's packed weight: any torch function gets them dequantized, nothing can write to it.

    It is made anew whenever it is asked for and holds the module, so that looking at its shape, dtype or device costs nothing.
    """

    module: Packed

    @staticmethod
    def __new__(cls, module: Packed) -> PackedWeight:
        made: PackedWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, module.weight_shape, dtype=module.compute_dtype, device=module.plane_device
        )
        return made

    def __init__(self, module: Packed) -> None:
        self.module = module

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {self.dtype})"

    @property
    def data(self) -> PackedWeight:  # type: ignore[override]
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError("a packed weight cannot be assigned: merge adapters with requantize(), or call dequantize() on the model")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is _OWN_OP:
            return args[0]
        if func._schema.is_mutable and any(
            isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write
            for value, argument in zip(args, func._schema.arguments, strict=False)
        ):
            raise RuntimeError(f"{func}: a packed weight cannot be written to; merge adapters with requantize()")

        def dense(value: Any) -> Any:
            return value.module.dequantize(value.dtype) if isinstance(value, cls) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Let the planes of a module that accelerate has offloaded be there, outside of its own forward."""
    if "_hf_hook" not in module.__dict__:
        yield
        return
    from accelerate.utils import align_module_device  # type: ignore[import-untyped, import-not-found]

    with align_module_device(module):
        yield
def refuse_another(module: Packed, value: Tensor) -> None:
    """What ``module.weight = value`` does: nothing for the module's own weight, ``RuntimeError`` for any other."""
    if not isinstance(value, PackedWeight) or value.module is not module:
        raise RuntimeError("a packed weight cannot be assigned: merge adapters with requantize(), or call dequantize() on the model")


class Packed(nn.Module):
    """Segments of rows, each lowered by itself; their planes are buffers that move between devices and are never cast.

    A weight is one segment unless its rows come from tensors of different schemes (a fused projection). Buffers bear the planes' names
    (``qformats.kernels.layout``), those of segment i > 0 with ``_i`` behind.
    """

    compute: str
    compute_dtype: torch.dtype
    source: Source | None = None  # what the rows are in a checkpoint, which names the entries of the state dict
    input_rules: tuple[tuple[int, int, str], ...] = ()  # runs of rows and the rule that rounds what they meet (qformats.runtime.inputs)
    output_rules: tuple[tuple[int, int, str], ...] = ()  # the same of what leaves a linear layer
    stretches: tuple[Stretch, ...] = ()  # the stored weights that the rows are
    changed: frozenset[str] = frozenset()  # those of them that have new codes
    shared = False  # whether another module multiplies with these planes

    def hold(self, segments: Sequence[Lowered], compute_dtype: torch.dtype, compute: str) -> None:
        """Register the planes; ``compute``: see ``qformats.kernels.dispatch``. ``compute_dtype``: of the floats that it stands for."""
        self.compute, self.compute_dtype = compute, compute_dtype
        self.layouts = tuple(segment.layout for segment in segments)
        self.starts = tuple(sum(layout.rows for layout in self.layouts[:i]) for i in range(len(self.layouts)))
        for number, segment in enumerate(segments):
            for name, plane in segment.planes.items():
                self.register_buffer(_buffer(name, number), plane)
        self._texts = tuple(layout.text for layout in self.layouts)
        self._names = tuple(tuple(_buffer(name, i) for name in layout.names) for i, layout in enumerate(self.layouts))
        self._rows = sum(layout.rows for layout in self.layouts)
        self._forget()
        self._is_hf_initialized = True  # transformers then leaves it alone

    def _forget(self) -> None:
        """Let go of what was made of the planes."""
        self._held: list[Lowered | None] = [None] * len(self.layouts)
        self._straight: list[Straight | None] = [None] * len(self.layouts)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Rows of all segments, and columns."""
        return (self._rows, self.layouts[0].columns)

    @property
    def plane_device(self) -> torch.device:
        return self._buffers["codes0"].device  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(self.segment(i).nbytes for i in range(len(self.layouts)))

    def segment(self, number: int) -> Lowered:
        """The planes of a segment as they are now."""
        held = self._held[number]
        now = [self._buffers[name] for name in self._names[number]]
        if held is None or any(one is not plane for one, plane in zip(held.planes.values(), now, strict=True)):
            layout = self.layouts[number]
            held = Lowered(layout, dict(zip(layout.names, now, strict=True)))  # type: ignore[arg-type]
            if "_hf_hook" not in self.__dict__:  # of offloaded planes nothing is kept
                self._held[number] = held
        return held

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows as a canonical tensor; those of several segments must be of one scheme."""
        from qformats.rewrite import concatenate_rows

        parts = []
        for number, (first, layout) in enumerate(zip(self.starts, self.layouts, strict=True)):
            low, high = max(start, first) - first, min(stop, first + layout.rows) - first
            if low < high:
                whole = low == 0 and high == layout.rows and len(layout.shape) == 2
                parts.append(raised(self.segment(number)) if whole else self.segment(number).tensor(slice(low, high)))
        return concatenate_rows(parts)

    def multiply(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """``x`` (..., K) times the transposed rows ``start:stop``, (..., stop - start), in the dtype of ``x``.

        Inputs are rounded first where the checkpoint says so (``input_rules``).
        """
        stop = self._rows if stop is None else stop
        if not self.input_rules:
            return self._product(x, 0, start, stop) if len(self._names) == 1 else self._exact(x, start, stop)
        parts = []
        for first, last, rule in self.input_rules:
            low, high = max(start, first), min(stop, last)
            if low < high:
                parts.append(self._exact(round_inputs(x, rule), low, high).to(x.dtype) if rule else self._exact(x, low, high))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _exact(self, x: Tensor, start: int, stop: int) -> Tensor:
        parts = []
        for number, (first, layout) in enumerate(zip(self.starts, self.layouts, strict=True)):
            low, high = max(start, first) - first, min(stop, first + layout.rows) - first
            if low < high:
                parts.append(self._product(x, number, low, high))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _product(self, x: Tensor, number: int, start: int, stop: int) -> Tensor:
        if is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            planes = [self._buffers[name] for name in self._names[number]]
            made: Tensor = dispatch.matmul(x, planes, self._texts[number], start, stop, self.compute)
            return made
        if x.is_cpu and (known := self.straight(number)) is not None:
            return known(x, start, stop)
        return dispatch.multiply(x, self.segment(number), start, stop, self.compute)

    def straight(self, number: int) -> Straight | None:
        """The product with a segment that is on the CPU, where a loop serves; kept until its planes are others."""
        made = self._straight[number]
        if made is None or not made.holds(self._buffers):
            first = self._buffers[self._names[number][0]]
            made = straight(self.segment(number), self._names[number], self.compute) if first is not None and first.is_cpu else None
            self._straight[number] = None if "_hf_hook" in self.__dict__ else made
        return made

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """All rows, each exact value rounded once to ``dtype`` (None: the compute dtype)."""
        wanted = self.compute_dtype if dtype is None else dtype
        parts = [self.segment(i).dequantize(slice(None), wanted) for i in range(len(self.layouts))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def requantize(self, floats: Tensor, keep: bool = False) -> Kept | None:
        """New codes for ``floats`` (rows, columns) in the types that the checkpoint has; the planes of before, where ``keep`` is set.

        What ``save_pretrained`` then writes is what a quantizer of that format makes of these floats; stored weights whose floats are the
        dequantized ones keep their codes. Nothing changes where it raises: ``Unsupported('requantize')`` for types that have no quantizer
        (learned codebooks), or where the module has no types of its own; ``BadFile('not-finite')`` for NaN and infinities.
        """
        if not self.stretches:
            raise Unsupported("requantize", "these weights are of no checkpoint that says how they are stored")
        if tuple(floats.shape) != self.weight_shape:
            raise ValueError(f"floats of shape {tuple(floats.shape)} for a weight of shape {self.weight_shape}")
        before = tuple(self.segment(i) for i in range(len(self.layouts)))
        made: list[Lowered] = []
        changed = set(self.changed)
        for first, old in zip(self.starts, before, strict=True):
            last = first + old.layout.rows
            parts = [part for part in self.stretches if first <= part.start and part.stop <= last]
            segments, names = requantized(old, first, floats[first:last], parts)
            made += segments
            changed |= names
        kept = Kept(before, self.changed) if keep else None
        self.hold_instead(made)
        self.changed = frozenset(changed)
        return kept

    def restore(self, kept: Kept) -> None:
        """Put back the planes that ``requantize`` gave, on the device where the module is now."""
        device = self.plane_device
        self.hold_instead([Lowered(old.layout, {name: plane.to(device) for name, plane in old.planes.items()}) for old in kept.segments])
        self.changed = kept.changed

    def storage_now(self, name: str, before: Any) -> Any:
        """How the stored weight ``name`` is stored now that its codes are new; ``before`` where they are not."""
        return next((part.storage for part in self.stretches if part.name == name and name in self.changed), before)

    def hold_instead(self, segments: Sequence[Lowered]) -> None:
        """Put other planes in the place of those that are held."""
        for names in self._names:
            for name in names:
                del self._buffers[name]
        self.hold(segments, self.compute_dtype, self.compute)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.source is not None:
            for name in (name for names in self._names for name in names):
                del destination[prefix + name]
            with present(self):
                destination.update(self.source.tensors(self, prefix))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        if self.source is None:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            return
        if not self.__dict__.pop("_taken", False):  # else the model has taken them already
            fill(self, self.source, state_dict, prefix, missing, errors)
        planes = {name: self._buffers.pop(name) for names in self._names for name in names}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._buffers.update(planes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move planes and cast none: a dtype is that of the results and of the bias."""
        planes = {name: self._buffers.pop(name) for names in self._names for name in names}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            device = fn(torch.empty(0, dtype=torch.uint8, device=self._device_of(planes))).device
            self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self._device_of(planes))).dtype
            moved = {name: _moved(plane, device, fn) for name, plane in planes.items()}
        except BaseException:
            self._buffers.update(planes)
            raise
        self._buffers.update(moved)
        self._forget()
        return self

    @staticmethod
    def _device_of(planes: dict[str, Tensor | None]) -> torch.device:
        first = planes["codes0"]
        assert first is not None
        return first.device

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_held"], state["_straight"] = [None] * len(self.layouts), [None] * len(self.layouts)
        return state


def _buffer(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_{number}"


def _moved(plane: Tensor | None, device: torch.device, fn: Callable[[Tensor], Tensor]) -> Tensor:
    assert plane is not None
    if not plane.dtype.is_floating_point:
        return fn(plane)
    if plane.is_meta and device != plane.device:
        return torch.empty_like(plane, device=device)
    return plane.to(device) if plane.device != device else plane

"""How the compiled loops of ``qformats.loops.rows`` read a lowered weight: addresses, widths and kinds, made once for each weight.

It is decided here that the loops' arithmetic gives the exact value rounded once: in float32, where the difference to the zero point and
the factors' product are float32 numbers, so that one fused multiply-and-add is the only rounding; in float64, where every step is exact
(``Extent`` of ``qformats.real``). A weight of another kind has no plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from math import gcd, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qformats import grids
from qformats.kernels.layout import Layout, ParamLayout, widths
from qformats.kernels.lower import Lowered, evaluated, nested, raised
from qformats.loops import find
from qformats.real import Extent, Real
from qformats.scheme import Cyclic, Flat, Float, Grid, Integer, Learned, Table, Tile

__all__ = ["Plan", "plan_of", "values_of"]

Array = np.ndarray[Any, Any]

_ROLES = {"zero_point": 2, "offset": 3}
_FORMS = {
    torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3, torch.uint8: 4, torch.int8: 5, torch.int16: 6, torch.int32: 7,
}  # fmt: skip
_BYTES, _CODES, _LINE, _SIGNED_LINE = range(8, 12)
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Plan:
    """What the loops take: ``head``, ``slots``, ``constants`` (see ``qformats.loops.rows``); ``kept``: what they point to besides planes.

    ``group``: columns of a group. ``padded``: columns of the inputs. ``plain``: whether the codes can be read as strips. ``strips``:
    whether the loops make exact weights of them; inputs then lie in the order of strips. ``integers``: where the values of the codes are
    integers of a byte, so that products of bytes serve, those of sixteen codes as unsigned bytes (none: the codes themselves), what one
    counts, and what they are increased by. ``grid``: of the codes.
    """

    head: Array
    slots: Array
    constants: Array
    group: int
    padded: int
    strips: bool
    plain: bool
    integers: tuple[Array, Array] | None
    kept: list[Any]
    grid: Grid


@dataclass(frozen=True, eq=False)
class _Made:
    """A plan, and the planes that it was made of; ``versions`` count what was written to them since."""

    planes: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    layout: Layout
    plan: Plan | None


_MADE: dict[int, _Made] = {}


def plan_of(lowered: Lowered) -> Plan | None:
    """The plan of a weight on the CPU, made when it is first asked for; None where no loop serves it."""
    planes = tuple(lowered.planes.values())
    key, versions = id(planes[0]), tuple(0 if plane.is_inference() else plane._version for plane in planes)
    held = _MADE.get(key)
    if held is not None and held.versions == versions and held.layout == lowered.layout:
        found = tuple(ref() for ref in held.planes)
        if all(one is plane for one, plane in zip(found, planes, strict=True)):
            return held.plan
    plan = _plan(lowered)
    refs = (weakref.ref(planes[0], lambda _: _MADE.pop(key, None)), *(weakref.ref(plane) for plane in planes[1:]))
    _MADE[key] = _Made(refs, versions, lowered.layout, plan)
    return plan


# ---------------------------------------------------------------- what codes stand for


@lru_cache(maxsize=64)
def _entries(grid: Grid) -> Tensor | None:
    """The values of a constant grid, float64, (entries,) or (entries, v_in); None for integers."""
    if isinstance(grid, Float):
        return grids.float_values(grid.name)
    return grids.table_values(grid.name) if isinstance(grid, Table) else None


@lru_cache(maxsize=64)
def _table(grid: Grid) -> Tensor:
    """The same in float32, as many entries as a code of the grid's bits can name, at least 256."""
    entries = _entries(grid)
    assert entries is not None
    flat = entries.to(torch.float32).reshape(len(entries), -1)
    return torch.nn.functional.pad(flat, (0, 0, 0, max(0, 256 - len(flat)))).contiguous()


@lru_cache(maxsize=64)
def _value_extent(grid: Grid) -> Extent:
    entries = _entries(grid)
    if entries is None:
        assert isinstance(grid, Integer)
        return Extent(grid.bits, 0, grid.bits)
    extent = Real.of(entries.reshape(-1)[: 1 << 14]).extent if entries.numel() <= 1 << 14 else Extent(8, 0, 8)
    assert extent is not None
    return extent


def values_of(plan: Plan) -> Tensor:
    """What the codes of a ``plain`` plan stand for before scales, zero points and offsets, float64; of bits that planes have."""
    entries, loops = _entries(plan.grid), find("rows")
    if entries is not None:
        return entries
    bits = int(plan.head[loops.FIELD : loops.FIELD + int(plan.head[loops.PLANES])].sum())
    lowest = -128 if int(plan.head[loops.KIND]) == loops.SIGNED else 0
    return torch.arange(lowest, lowest + (1 << bits), dtype=torch.float64)


def _bias(layout: Layout) -> int:
    """What planes have codes increased by."""
    grid = layout.grid
    return 1 << (grid.bits - 1) if isinstance(grid, Integer) and grid.signed and grid.bits < 8 else 0


# ---------------------------------------------------------------- parameters


@dataclass
class _Slot:
    """A parameter as the loops find it: its stored numbers on rows, ``width`` columns each."""

    role: int
    param: ParamLayout
    count: int
    width: int
    height: int
    modulo: int
    extent: Extent
    single: bool  # whether every number is a float32
    numbers: Tensor | None = None  # None: codes
    table: Tensor | None = None  # float64 (256,)
    codes: list[Tensor] = field(default_factory=list)
    bits: int = 0
    inner: _Slot | None = None


_Place = tuple[int, int, int, int]


def _place(p: ParamLayout, shape: tuple[int, ...]) -> _Place | None:
    """Numbers in a row, columns of each, rows that share them, and the number of such rows after which they start again (0: never)."""
    block, k, rows = p.block, shape[-1], prod(shape[:-1])
    if isinstance(block, Tile):
        count = p.shape[-1]
        width = k if count == 1 else block.sizes[-1]
        lead, tall = p.shape[:-1], block.sizes[:-1]
        if prod(lead) == 1:
            return count, width, max(1, rows), 0
        if len(lead) == 1:
            return count, width, tall[0], 0
        if shape[-2] % tall[1]:
            return None
        if tall[0] == 1:
            return count, width, tall[1], 0
        return (count, width, tall[1], lead[1]) if lead[0] == 1 else None
    if isinstance(block, Flat):
        if k % block.n == 0:
            return k // block.n, block.n, 1, 0
        return (1, k, block.n // k, 0) if block.n % k == 0 else None
    assert isinstance(block, Cyclic)
    return (k, 1, 1, block.count // k) if block.count % k == 0 else None


def _plain_extent(values: Tensor, measured: bool) -> Extent | None:
    if values.dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz) and not measured:
        return Extent(4, -20, 17)
    found = Real.of(values)
    return (found.measured() if measured else found).extent


def _slot(p: ParamLayout, lowered: Lowered, measured: bool) -> _Slot | None:
    """A parameter's slot; ``measured``: look at its numbers to know their extent."""
    place = _place(p, lowered.layout.shape)
    if place is None:
        return None
    role = _ROLES.get(p.role, 1 if p.inverse else 0)
    if p.nested is not None:
        packed = None if p.rounded_to else _packed_slot(role, p, place, lowered, measured)
        if packed is not None:
            return packed
        values = _held_values(p, lowered)
        return None if values is None else _plain_slot(role, p, place, values, measured)
    return _plain_slot(role, p, place, lowered.planes[p.role], measured)


def _held_values(p: ParamLayout, lowered: Lowered) -> Tensor | None:
    """A nested parameter evaluated: in the dtype that its owner rounds it to, or in the narrowest that holds it exactly."""
    if p.rounded_to:
        return evaluated(p, lowered.planes).contiguous()
    real = raised(nested(p, lowered.planes)).real()
    if real.low is not None:
        return None
    values = real.high.reshape(-1)
    single = values.to(torch.float32)
    same = bool(((single.to(torch.float64) == values) | values.isnan()).all())
    return single if same else values.contiguous()


def _plain_slot(role: int, p: ParamLayout, place: _Place, values: Tensor, measured: bool) -> _Slot | None:
    extent = _plain_extent(values, measured)
    if extent is None:
        return None
    single = values.dtype != torch.float64 and not (values.dtype == torch.int32 and extent.bits > 24)
    slot = _Slot(role, p, *place, extent, single, values.contiguous())
    if values.dtype not in _FORMS:
        if values.element_size() != 1:
            return None
        every = torch.arange(256, dtype=torch.uint8).view(values.dtype).to(torch.float64)
        slot.table = every.contiguous()
    return slot


def _packed_slot(role: int, p: ParamLayout, place: _Place, lowered: Lowered, measured: bool) -> _Slot | None:
    """A parameter whose packed codes the loops look up; None for another form."""
    inside = nested(p, lowered.planes)
    layout, planes = inside.layout, inside.planes
    known = isinstance(layout.grid, Integer | Float) or (isinstance(layout.grid, Table) and layout.grid.v_in == 1)
    if not known or layout.bits > 8 or layout.columns != place[0] or layout.signs or layout.index or layout.param("offset"):
        return None
    factor, inner, zero = 1.0, None, float(_bias(layout))
    for q in layout.params:
        one = q.nested is None and prod(q.shape) == 1
        if one and q.role == "zero_point":
            zero += float(planes[q.role].reshape(-1)[0])
        elif one and not q.inverse:
            factor *= float(planes[q.role].reshape(-1)[0].to(torch.float64))
        else:
            inner = _inner_slot(q, layout, planes, measured) if inner is None else None
            if inner is None:
                return None
    table = (_named_values(layout) - zero) * factor
    extent = Real.of(table).extent
    assert extent is not None
    total = extent if inner is None else extent.times(inner.extent)
    codes = [planes[f"codes{i}"] for i in range(len(widths(layout.bits)))]
    alone = bool((table.to(torch.float32).to(torch.float64) == table)[~table.isnan()].all())
    single = alone if inner is None else _in_single(total)
    return _Slot(role, p, *place, total, single, None, table, codes, layout.bits, inner)


def _inner_slot(q: ParamLayout, layout: Layout, planes: Mapping[str, Tensor], measured: bool) -> _Slot | None:
    place = _place(q, layout.shape)
    if place is None or q.nested is not None or q.inverse or q.role == "zero_point" or planes[q.role].dtype not in _FLOAT_DTYPES:
        return None
    return _plain_slot(-1, q, place, planes[q.role], measured) if place[3] == 0 else None


def _named_values(layout: Layout) -> Tensor:
    """What each byte stands for as a code of the layout's planes, float64 (256,)."""
    entries = _entries(layout.grid)
    if entries is not None:
        return torch.nn.functional.pad(entries, (0, 256 - len(entries)))
    every = torch.arange(256, dtype=torch.float64)
    return every.to(torch.uint8).view(torch.int8).to(torch.float64) if layout.codes_dtype == "int8" and layout.bits == 8 else every


# ---------------------------------------------------------------- exactness


def _in_single(extent: Extent) -> bool:
    return extent.bits <= 24 and extent.unit >= -149 and extent.top <= 127


def _arithmetic(layout: Layout, slots: list[_Slot], constants: list[float]) -> tuple[bool, bool, bool]:
    """Whether float32, float64, and float64 with a division at the end, round once."""

    def constant(role: int) -> Extent:
        extent = Real.of(torch.tensor([constants[role]], dtype=torch.float64)).extent
        assert extent is not None
        return extent

    def of(role: int) -> list[_Slot]:
        return [slot for slot in slots if slot.role == role]

    zero = [*(slot.extent for slot in of(2)), *([constant(2)] if constants[2] else [])]
    centred = reduce(Extent.plus, zero, _value_extent(layout.grid))
    factors = [*(slot.extent for slot in of(0)), *([constant(0)] if constants[0] != 1.0 else [])]
    steps = [centred]
    for factor in factors:
        steps.append(steps[-1].times(factor))
    scale = factors[0] if len(factors) == 1 else reduce(Extent.times, factors, Extent(1, 0, 1))
    alone = len(factors) <= 1 and all(slot.single for slot in of(0)) and (not factors or bool(of(0)) or _in_single(scale))
    offset = [*(slot.extent for slot in of(3)), *([constant(3)] if constants[3] else [])]
    divisors = [*(slot for slot in of(1)), *([None] if constants[1] != 1.0 else [])]
    exact = all(slot.single for slot in of(3)) and (not constants[3] or _in_single(constant(3)))
    single = _in_single(centred) and (alone or _in_single(scale)) and exact and not divisors
    fits = all(step.fits for step in steps)
    double = fits and not divisors and all(steps[-1].plus(o).fits for o in offset)
    divided = fits and len(divisors) == 1 and not offset and steps[-1].bits <= 24
    by = divisors[0].single if divided and divisors[0] is not None else constants[1] == float(np.float32(constants[1]))
    return single, double, divided and by


# ---------------------------------------------------------------- the plan


def _served(layout: Layout) -> bool:
    grid = layout.grid
    if isinstance(grid, Learned) or layout.bits > 16 or not layout.rows or not layout.columns:
        return False
    entries = _entries(grid)
    if entries is not None and len(entries) != 1 << layout.bits:
        return False
    if layout.codes_dtype == "int8" and not isinstance(grid, Integer | Float):
        return False
    return not (layout.signs and layout.param("zero_point")) and (not isinstance(grid, Integer) or grid.bits <= 8)


def _plan(lowered: Lowered) -> Plan | None:
    layout = lowered.layout
    loops = find("rows")
    if loops is None or not find("lanes").FUSED or not _served(layout):
        return None
    if any(not plane.is_contiguous() for plane in lowered.planes.values()):
        return None
    kept = None
    for measured in (False, True):  # what numbers there are may allow float32 where their dtype does not
        found = _gathered(lowered, measured)
        if found is None:
            break
        slots, constants = found
        allowed = _arithmetic(layout, slots, constants)
        grouped = _groups(lowered, slots)
        if grouped is None:
            break
        width, index = grouped
        if allowed[0] and index is None:
            return _assembled(loops, lowered, slots, constants, (width, index, 0))
        if kept is None and any(allowed[1:]):
            kept = slots, constants, (width, index, 1 if allowed[1] else 2)
    return None if kept is None else _assembled(loops, lowered, *kept)


def _gathered(lowered: Lowered, measured: bool) -> tuple[list[_Slot], list[float]] | None:
    """Slots of the parameters that vary; the constants of the others by role, a -0 where there is no offset."""
    layout, slots = lowered.layout, []
    constants = [1.0, 1.0, float(_bias(layout)), -0.0]
    for p in layout.params:
        if p.nested is None and prod(p.shape) == 1:
            value = float(lowered.planes[p.role].reshape(-1)[0].to(torch.float64))
            role = _ROLES.get(p.role, 1 if p.inverse else 0)
            constants[role] = constants[role] * value if role < 2 else constants[role] + value
            continue
        slot = _slot(p, lowered, measured)
        if slot is None:
            return None
        slots.append(slot)
    return slots, constants


def _groups(lowered: Lowered, slots: list[_Slot]) -> tuple[int, Tensor | None] | None:
    """Columns of the common groups, and the group of each column where groups are no whole vectors or lie as an index says."""
    layout = lowered.layout
    varying = [slot.width for slot in slots if slot.count > 1]
    width = reduce(gcd, varying, 0) or -(-layout.columns // 16) * 16
    if varying and width % 16 == 0 and width % 128:
        width = gcd(width, 128)  # a strip has a whole number of groups, or a group of strips
    if layout.index == "group_index":
        index = lowered.planes["group_index"]
        if index.ndim != 1 or len(set(varying)) > 1 or 1 in varying:
            return None
        counts = [slot.count for slot in slots if slot.count > 1]
        if len(set(counts)) > 1 or (counts and not 0 <= int(index.min()) <= int(index.max()) < counts[0]):
            return None
        return (width, index.to(torch.int32).contiguous()) if counts else (width, None)
    if width % 16 == 0:
        return width, None
    return width, (torch.arange(layout.columns) // width).to(torch.int32)


def _assembled(loops: Any, lowered: Lowered, slots: list[_Slot], constants: list[float], how: tuple[int, Tensor | None, int]) -> Plan:
    layout, (width, index, arithmetic) = lowered.layout, how
    k = layout.columns
    kept: list[Any] = [index, *(slot.table for slot in slots), *(slot.numbers for slot in slots if slot.param.nested is not None)]
    counts = [slot.count for slot in slots if slot.count > 1 and layout.index == "group_index"]
    groups = counts[0] if counts else -(-k // width)
    head = np.zeros(loops.HEAD, np.int64)
    planes = [lowered.planes[f"codes{i}"] for i in range(len(widths(layout.bits)))]
    v_in = layout.grid.v_in if isinstance(layout.grid, Table) else 1
    kind, table = _kind(layout)
    head[[loops.COLUMNS, loops.PADDED, loops.PLANES, loops.CODES]] = k, -(-k // 128) * 128, len(planes), k // v_in
    for i, (plane, field_) in enumerate(zip(planes, widths(layout.bits), strict=True)):
        head[loops.PLANE + i], head[loops.STRIDE + i], head[loops.FIELD + i] = plane.data_ptr(), plane.shape[1], field_
    head[[loops.KIND, loops.V_IN, loops.WIDTH, loops.GROUPS, loops.ARITHMETIC]] = kind, v_in, width, groups, arithmetic
    if table is not None:
        head[loops.TABLE] = table.data_ptr()
        kept.append(table)
    if layout.signs:
        head[[loops.SIGNS, loops.SIGNS_STRIDE]] = lowered.planes["signs"].data_ptr(), lowered.planes["signs"].shape[1]
    if index is not None:
        head[loops.INDEX] = index.data_ptr()
    rows = [row for slot in slots for row in _rows_of(slot, len(slots), slots, groups, width)]
    order = sorted(rows, key=lambda row: row[0])
    table_of = np.array([row for _, row in order], np.int64).reshape(-1, loops.SLOT)
    plain = not layout.signs and index is None and layout.bits <= 8 and kind < 4
    plain = plain and (kind < 3 or k % 128 == 0)
    strips = plain and arithmetic == 0
    head[[loops.ROWS, loops.QUICK]] = len(planes[0]), arithmetic == 0 and _quick(slots, groups, width, constants)
    integers = _integers(layout, kind) if plain else None
    return Plan(head, table_of, np.array(constants, np.float64), width, int(head[loops.PADDED]), strips, plain, integers, kept, layout.grid)


def _quick(slots: list[_Slot], groups: int, width: int, constants: list[float]) -> bool:
    """Whether ``qformats.loops.factors`` makes the parameters in float32."""
    forms = {*_FORMS} - {torch.float64, torch.int16, torch.int32}
    roles = [slot.role for slot in slots]
    return len(roles) == len({*roles}) and 1 not in roles and all(
        slot.count == groups and slot.width == width and slot.single
        and (slot.numbers is None or slot.table is not None or slot.numbers.dtype in forms)
        for slot in slots
    )  # fmt: skip


def _kind(layout: Layout) -> tuple[int, Tensor | None]:
    """Of ``qformats.loops.rows``, what codes stand for, and the float32 table."""
    grid = layout.grid
    if isinstance(grid, Integer):
        return (1 if grid.signed and grid.bits == 8 else 0), None
    table = _table(grid)
    if isinstance(grid, Table) and grid.v_in > 1:
        return 4, table
    return (2 if layout.bits == 4 else 3), table


def _integers(layout: Layout, kind: int) -> tuple[Array, Array] | None:
    """``Plan.integers``: of integers, and of tables of sixteen numbers that are bytes, or are when doubled."""
    if kind <= 1:
        return np.zeros(16, np.uint8), np.array([1.0, 128.0 * kind])
    entries = _entries(layout.grid)
    if kind != 2 or entries is None:
        return None
    for unit in (1.0, 0.5):
        steps = entries / unit
        low, high = float(steps.min()), float(steps.max())
        if bool((steps == steps.round()).all()) and high - low < 256:
            return (steps - low).to(torch.uint8).numpy(), np.array([unit, -low])
    return None


def _rows_of(slot: _Slot, first_inner: int, slots: list[_Slot], groups: int, width: int) -> list[tuple[int, list[int]]]:
    """A slot's row of numbers, and that of its inner scale, each with its place."""
    at = next(i for i, other in enumerate(slots) if other is slot)
    inner = first_inner + sum(1 for other in slots[:at] if other.inner is not None)
    repeat = groups if slot.count == 1 else (1 if slot.count == groups else slot.width // width)
    found = [(at, _row(slot, repeat, inner if slot.inner is not None else -1))]
    if slot.inner is not None:
        inside = slot.inner
        found.append((inner, _row(inside, slot.count if inside.count == 1 else inside.width, -1)))
    return found


def _row(slot: _Slot, repeat: int, inner: int) -> list[int]:
    if slot.numbers is not None:
        form = _BYTES if slot.table is not None else _FORMS[slot.numbers.dtype]
        address, stride = slot.numbers.data_ptr(), slot.count * slot.numbers.element_size()
    else:
        form, address, stride = _spacing(slot), 0, 0
    lookup = 0 if slot.table is None else slot.table.data_ptr()
    fields = widths(slot.bits) if slot.codes else ()
    planes, strides = [plane.data_ptr() for plane in slot.codes], [plane.shape[1] for plane in slot.codes]

    def three(values: list[int]) -> list[int]:
        return [*values, 0, 0, 0][:3]

    start = [slot.role, form, address, stride, slot.count, repeat, slot.height, slot.modulo, lookup, inner, len(planes)]
    return [*start, *three(planes), *three(strides), *three(list(fields))]


def _spacing(slot: _Slot) -> int:
    """Whether the numbers of packed codes are evenly spaced."""
    table = slot.table
    assert table is not None
    step = table[1] - table[0]
    for form, codes in ((_LINE, torch.arange(256)), (_SIGNED_LINE, torch.arange(256).to(torch.uint8).view(torch.int8))):
        line = codes.to(torch.float64) * step + table[0]
        if bool((line[: 1 << slot.bits] == table[: 1 << slot.bits]).all()):
            return form
    return _CODES

"""Exact rewrites of a canonical tensor: each changes its form and keeps every weight's real value, or refuses with a reason.

All are pure functions on ``QuantizedTensor``. A refusal is ``Refused`` (never a silent approximation); the search in
``qformats.reencode`` and the planner quote its reason. Rounding of parameters, which keeps codes only, is in ``round_scale``
and ``zero_to_offset(..., rounding=True)`` and reports the largest error it made.
"""

from __future__ import annotations

from qformats.rewrite.codes import (
    block_loops,
    block_range,
    block_range_definition,
    flip_and_shift,
    offset_to_zero,
    recentre,
    relabel_definition,
    to_signed,
    to_unsigned,
    widen,
    zero_to_offset,
    zero_values,
)
from qformats.rewrite.forms import Refused
from qformats.rewrite.groups import merge_groups, split_groups, to_row_blocks
from qformats.rewrite.levels import Levels, level_param, levels_of, nest_scale, spread_runs, stepped, stepped_codes
from qformats.rewrite.rows import (
    absorb_group_index,
    concatenate_rows,
    drop_trivial_group_index,
    pad_columns,
    permute_column_groups,
    select_rows,
    single_row_entries,
)
from qformats.rewrite.scales import fold_scales, fold_wide, round_scale, unnest_scale
from qformats.rewrite.whole import code_ends, code_table, common_divisor, is_whole, looked_up, whole_codes, whole_range

__all__ = [
    "Levels",
    "Refused",
    "absorb_group_index",
    "block_loops",
    "block_range",
    "block_range_definition",
    "code_ends",
    "code_table",
    "common_divisor",
    "concatenate_rows",
    "drop_trivial_group_index",
    "flip_and_shift",
    "fold_scales",
    "fold_wide",
    "is_whole",
    "level_param",
    "levels_of",
    "looked_up",
    "merge_groups",
    "nest_scale",
    "offset_to_zero",
    "pad_columns",
    "permute_column_groups",
    "recentre",
    "relabel_definition",
    "round_scale",
    "select_rows",
    "single_row_entries",
    "split_groups",
    "spread_runs",
    "stepped",
    "stepped_codes",
    "to_row_blocks",
    "to_signed",
    "to_unsigned",
    "unnest_scale",
    "whole_codes",
    "whole_range",
    "widen",
    "zero_to_offset",
    "zero_values",
]

"""Inputs of linear layers rounded as the owner of the format rounds them: what ``formats.protocol.Inputs`` says, as torch operations.

The result is the float32 value that the rounded input stands for, which then meets the exact weight. The gradient goes straight through.
A rule travels as text, so that the operator ``qformats::round_inputs`` is one node of a compiled graph; nothing in it waits for the device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformats import registry
from qformats.formats.protocol import Inputs

if TYPE_CHECKING:
    from qformats.checkpoint import Checkpoint
    from qformats.runtime.anew import Stretch

__all__ = ["ACTIVATIONS", "by_rows", "check", "round_inputs", "rounded", "rules"]

ACTIVATIONS = ("published", "float")
_FP8 = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_SMALL = {"e2m1": (1, 0), "e2m3": (3, 0), "e3m2": (2, -2)}  # digits after the point, exponent of the smallest normal number
_LARGEST = {"e4m3fn": 448.0, "e5m2": 57344.0, "e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0}
_TOP = {"e4m3fn": 8, "e5m2": 15, "e2m1": 2, "e2m3": 2, "e3m2": 4}  # exponent of the largest number
_TINY = 2.0**-127


def check(checkpoint: Checkpoint) -> None:
    """Refuse rules that are not known, before any weight is read; raises what the formats' hooks do."""
    for name in checkpoint.modules:
        if checkpoint.is_quantized(name):
            for what in ("inputs", "outputs"):
                _rule(checkpoint, name, what)


def _rule(checkpoint: Checkpoint, name: str, what: str) -> Inputs | None:
    module = checkpoint.modules[name]
    hook = getattr(registry.format_module(module.match.format), what, None)
    return None if hook is None else module.remember(f"rounded {what}", hook)


def rules(checkpoint: Checkpoint, parts: Sequence[Stretch], what: str = "inputs") -> tuple[tuple[int, int, str], ...]:
    """Runs of rows of a packed module and the rule of their inputs as text, ``""`` where these stay as they are; () where all do.

    ``what``: the format's hook, ``inputs`` or ``outputs``.
    """
    found: list[tuple[int, int, str]] = []
    for part in parts:
        rule = _rule(checkpoint, part.name, what)
        text = "" if rule is None else json.dumps(asdict(rule), separators=(",", ":"))
        if found and found[-1][2] == text and found[-1][1] == part.start:
            found[-1] = (found[-1][0], part.stop, text)
        else:
            found.append((part.start, part.stop, text))
    return tuple(found) if any(text for _, _, text in found) else ()


@lru_cache(maxsize=4096)
def _parse(text: str) -> Inputs:
    return Inputs(**json.loads(text))


def by_rows(text: str) -> bool:
    """Whether the rule rounds a row alike whatever rows are beside it; ``""`` is no rule."""
    rule = _parse(text) if text else None
    return rule is None or not (rule.outliers or rule.factored or (rule.per == "tensor" and rule.scale is None))


def round_inputs(x: Tensor, text: str) -> Tensor:
    """``x`` (..., K) by the rule ``text``: float32, of the same shape."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        made: Tensor = _round_inputs(x, text)
        return made
    return rounded(x, _parse(text))


@torch.library.custom_op("qformats::round_inputs", mutates_args=())
def _round_inputs(x: Tensor, rule: str) -> Tensor:
    return rounded(x, _parse(rule)).clone()


@_round_inputs.register_fake
def _(x: Tensor, rule: str) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.dtype = inputs[0].dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad.to(ctx.dtype), None


_round_inputs.register_autograd(_gradient, setup_context=_keep)


def rounded(x: Tensor, rule: Inputs) -> Tensor:
    """``x`` (..., K), K a multiple of ``rule.group`` or its last group short, by ``rule``: float32, of the same shape."""
    k = x.shape[-1]
    values = x.to(getattr(torch, rule.steps)).float() if rule.steps else x
    usual = values
    if rule.outliers:
        usual = values.masked_fill(values.abs() >= rule.outliers, 0)
    if rule.per == "group":
        usual = torch.nn.functional.pad(usual, (0, -k % rule.group)).unflatten(-1, (-1, rule.group))
    scale, zero = _scale(usual, rule)
    codes = usual * (1 / scale) if rule.reciprocal else usual / scale
    made = _grid(codes if zero is None else codes + zero, rule)
    made = (made - zero if zero is not None else made) * scale
    made = made.flatten(-2)[..., :k] if rule.per == "group" else made
    if rule.outliers:
        kept = (values.abs() >= rule.outliers).reshape(-1, k).any(0)
        return torch.where(kept, x.float(), made.float())
    return made.float()


def _scale(values: Tensor, rule: Inputs) -> tuple[Tensor, Tensor | None]:
    """The scale that ``values`` are divided by, and the zero point, in their dtype."""
    if rule.scale is not None and not rule.scale_grid:
        zero = torch.full((), rule.zero, dtype=values.dtype, device=values.device) if rule.zero else None
        return torch.full((), rule.scale, dtype=values.dtype, device=values.device), zero
    where: tuple[int, ...] = tuple(range(values.ndim)) if rule.per == "tensor" else (-1,)
    if not rule.symmetric:
        low, high = values.amin(where, keepdim=True).clamp(max=0), values.amax(where, keepdim=True).clamp(min=0)
        scale = _some(((high - low) / rule.span).clamp(min=rule.least))
        first, last = -rule.highest - 1, rule.highest
        return scale, (first - low / scale).clamp(first, last).round()
    largest = values.abs().amax(where, keepdim=True)
    if rule.most is not None:
        largest = largest.clamp(max=rule.most)
    if rule.scale_grid in ("floor", "even", "ceil"):
        return _power(largest.float(), rule).to(values.dtype), None
    scale = largest / rule.span
    if not rule.scale_grid:
        scale = scale.clamp(min=rule.least)
    else:
        factor = torch.full((), 1.0 if rule.scale is None else rule.scale, dtype=values.dtype, device=values.device)
        if rule.factored:
            factor = _some(values.abs().amax() / (_LARGEST[rule.grid] * _LARGEST[rule.scale_grid]))
        small = (scale * factor if rule.inverse else scale / factor).clamp(rule.least, _LARGEST[rule.scale_grid])
        small = _some(small.to(_FP8[rule.scale_grid]).to(values.dtype))
        return small / factor if rule.inverse else small * factor, None
    return _some(scale), None


def _some(scale: Tensor) -> Tensor:
    """1 instead of 0: what it divides is 0 itself."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _power(largest: Tensor, rule: Inputs) -> Tensor:
    """Powers of two for groups whose largest magnitudes these are, not below those that e8m0 has."""
    if rule.scale_grid == "ceil":
        mantissa, exponent = torch.frexp(largest / _LARGEST[rule.grid])  # mantissa in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    else:
        mantissa, exponent = torch.frexp(largest)
        if rule.scale_grid == "even":
            digits = 3 if rule.grid == "e2m3" else 1
            exponent = exponent + (mantissa >= 1 - 2.0 ** (-digits - 2)).to(exponent.dtype)
        exponent = exponent - 1 - _TOP[rule.grid]
    exponent = torch.where(largest == 0, torch.full_like(exponent, -127), exponent).clamp(-127, 127)
    return torch.exp2(exponent.float()).clamp(min=_TINY)


def _grid(values: Tensor, rule: Inputs) -> Tensor:
    """The nearest numbers of the grid, ties to even, the last ones beyond its ends."""
    if rule.grid.startswith("int"):
        return values.round().clamp(-rule.highest - 1, rule.highest)
    top = _LARGEST[rule.grid]
    values = values.clamp(-top, top)
    if rule.grid in _FP8:
        return values.to(_FP8[rule.grid]).to(values.dtype)
    digits, lowest = _SMALL[rule.grid]
    _, exponent = torch.frexp(values)
    step = torch.exp2((exponent - 1).clamp(min=lowest).to(values.dtype) - digits)
    return (values / step).round() * step

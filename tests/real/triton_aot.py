"""Kernels compiled for a GPU that is not there, and what their machine code says (Triton's wheel brings ptxas and cuobjdump)."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qformats.kernels.lower import Lowered
from qformats.kernels.triton import launch, products, tuning
from qformats.kernels.triton.spec import Spec

__all__ = ["Code", "compiled"]

_TYPES = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*)", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """A compiled kernel. ``stack``: bytes of spilled registers; ``shared``: of shared memory; ``step_weights``: of a thread and step."""

    registers: int
    stack: int
    shared: int
    sass: str
    step_weights: float

    @cached_property
    def lines(self) -> list[tuple[int, str, str]]:
        """(address, operation, operands)."""
        return [(int(address, 16), name, rest) for address, name, rest in _LINE.findall(self.sass)]

    @cached_property
    def loop(self) -> list[tuple[int, str, str]]:
        """The longest backward jump's body: one step; the whole kernel if it has none."""
        best: list[tuple[int, str, str]] = []
        for address, name, rest in self.lines:
            goal = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
            if goal is not None and int(goal[1], 16) < address:
                body = [line for line in self.lines if int(goal[1], 16) <= line[0] <= address]
                best = max(best, body, key=len)
        return best or self.lines

    def count(self, start: str, loop: bool = False) -> int:
        """Instructions whose name starts so."""
        return sum(name.startswith(start) for _, name, _ in (self.loop if loop else self.lines))

    @property
    def per_weight(self) -> float:
        """Instructions of one step for each weight."""
        return len(self.loop) / self.step_weights

    def names(self) -> Counter[str]:
        return Counter(name for _, name, _ in self.loop)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _source(kernel: Any, pointers: tuple[torch.Tensor, ...], types: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
        elif name == "planes":
            signature[name] = tuple(_TYPES[p.dtype] for p in pointers)
            attributes |= {(i, j): aligned for j in range(len(pointers))}
        else:
            signature[name] = types.get(name, "i32")
            if name in types or name in ("start", "stop"):
                attributes[(i,)] = aligned
    return ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)


def compiled(
    shape: str, lowered: Lowered, spec: Spec, block: tuning.Block, steps: int, count: int, dtype: str = "*bf16", full: bool = True
) -> Code:
    """``shape`` of ``qformats.kernels.triton.tuning.block``, for sm_90, ``count`` rows of x of ``dtype``. ``full``: rows of the
    weight fill the blocks."""
    types = {"x": dtype, "out": dtype, "experts": "*i32", "firsts": "*i32", "lasts": "*i32", "ids": "*i64", "order": "*i32"}
    constants: dict[str, Any] = {"S": spec, "ROWS": block.rows, "UNITS": block.units}
    if shape == "gemv":
        constants |= {"MOST": count, "STEPS": steps, "SPLITS": 1, "FULL": full}
    elif shape in ("tiles", "experts"):
        constants |= {"BATCH": block.batch, "STEPS": steps, "GROUP": 8, "GROUPED": shape == "experts", "EVEN": True, "FULL": full}
    else:
        constants |= {"CHOSEN": False, "ORDERED": False}
    kernel = {"gemv": products.gemv, "tiles": products.tiles, "experts": products.tiles, "dequantize": products.dequantize}[shape]
    source = _source(kernel, launch.pointers(lowered), types, constants)
    options = {"num_warps": block.warps, "num_stages": block.stages, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    weights = block.rows * block.units * spec.unit / (32 * block.warps)
    return _read(made.asm["cubin"], int(made.metadata.shared), weights)


def _read(cubin: bytes, shared: int, weights: float) -> Code:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([_tool("cuobjdump"), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Code(int(found[1]), int(found[2]), shared, sass, weights)

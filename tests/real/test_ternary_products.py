"""Why llama.cpp's NLL of a ternary file is not that of its floats: it rounds what a layer gets to 8 bits, and does nothing else.

A product with TQ1_0 or TQ2_0 has its inputs as Q8_K (256 numbers under one float32 scale), one with Q2_0 as Q8_0 (32 under a float16):
``type_traits_cpu`` in ``ggml-cpu.c``, ``quantize_row_q8_K_ref`` in ``ggml-quants.c`` of llama.cpp v0.5.0. Every product of a run is
computed again from the owner's weights and llama.cpp's own inputs, so rounded. Inputs of the models at hand, which never learned three
values, carry that rounding far: an NLL over 510 tokens is off by up to 0.04, each token by 0.3, without a sign. Over the whole text
that is gone.
"""

from __future__ import annotations

import ctypes as C
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workshop
from lab import floats_of
from running import ids_of
from test_weights import dequantized
from text import evaluation_text

Array = np.ndarray[Any, Any]
NAMES = ("bitnet-autobitlinear-slice", "bitnet-bitlinear-wide")
BLOCKS = {"TQ1_0": 256, "TQ2_0": 256, "Q2_0": 32}  # inputs under one scale


def rounded(x: Array, block: int) -> Array:
    """float32 (rows, K) as llama.cpp rounds a product's inputs, in float64."""
    runs = x.reshape(len(x), -1, block).astype(np.float32)
    scale = np.abs(runs).max(2, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    stored = scale if block == 256 else scale.astype(np.float16)
    return (np.rint(runs * inverse).astype(np.float64) * stored).reshape(x.shape)


class Products:
    """The error of every product with a ternary weight, relative to the product's norm, and what rounding the inputs alone makes of it."""

    def __init__(self, llama: Any, weights: dict[str, Array]) -> None:
        self.base, self.weights, self.types = llama.base_library(), weights, {code: name for name, code in llama.GGML.items()}
        self.worst = self.least_rounding = 0.0
        self.seen: dict[str, str] = {}
        self.callback = llama.EVAL_CALLBACK(self._on_tensor)

    def _on_tensor(self, pointer: Any, ask: bool, _: Any) -> bool:
        tensor = pointer.contents
        kind = self.types.get(tensor.source(0).type) if self.base.ggml_op_desc(C.addressof(tensor)) == b"MUL_MAT" else None
        if ask or kind not in BLOCKS:
            return kind in BLOCKS or not ask
        weight, x = tensor.source(0), tensor.source(1)
        name = weight.name.decode()
        inputs, found = x.floats().reshape(-1, x.ne[0])[:8], tensor.floats().reshape(-1, tensor.ne[0])[:8]
        values = self.weights[name].astype(np.float64)
        norm = float(np.linalg.norm(found))
        error, coarse = (float(np.linalg.norm(found - given @ values.T)) / norm for given in (rounded(inputs, BLOCKS[kind]), inputs))
        self.worst = max(self.worst, error)
        self.least_rounding = min(self.least_rounding or coarse, coarse)
        self.seen[name] = kind
        return True


@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.real), pytest.param(NAMES[1], marks=pytest.mark.real_full)])
def test_products_are_exact_but_for_rounded_inputs(name: str, checkpoint: Any, workshop: Workshop, llama: Any, figure: Any) -> None:
    file, _ = workshop.convert(checkpoint(name), "gguf")
    products = Products(llama, dequantized(llama, file))
    with llama.Llama(file, on_tensor=products.callback) as model:
        model.logits(model.tokenize(evaluation_text())[:64])
    figure(f"{len(products.seen)} products as {sorted(set(products.seen.values()))}: {products.worst:.1e} from those of inputs in 8 bits, "
           f"which are {products.least_rounding:.1e} and more from those of floats")  # fmt: skip
    assert len(products.seen) >= 28
    assert products.worst < 2e-6 < 1e-3 < products.least_rounding


@pytest.mark.real_full
@pytest.mark.parametrize("name", NAMES)
def test_nll_over_the_whole_text(name: str, checkpoint: Any, workshop: Workshop, llama: Any, figure: Any) -> None:
    """Some 4 200 tokens, over which the rounding of inputs has no say any more."""
    source: Path = checkpoint(name)
    plain, _ = workshop.convert(floats_of(source), "gguf:f32")
    ids, nll = ids_of(plain, evaluation_text(), 4200), []
    for file in (workshop.convert(source, "gguf")[0], plain):
        with llama.Llama(file) as model:
            nll.append(model.nll(ids, 256))
    figure(f"NLL {nll[0]:.4f}, the owner's floats {nll[1]:.4f}")
    assert abs(nll[0] - nll[1]) <= 0.015

"""Broken GPTQ and AWQ modules and configs: one clear error each, with its stable code, raised from headers before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, QFormatError, Unsupported
from qformats.formats import awq, gptq
from qformats.formats.protocol import Match, Module

N, K, G = 64, 96, 3
Parts = dict[str, RawTensor]
Config = dict[str, Any]


def plane(dtype: str, *shape: int) -> RawTensor:
    kinds = {"I32": "<i4", "F16": "<f2", "I64": "<i8", "I16": "<i2", "I8": "|i1", "U8": "|u1", "F32": "<f4"}
    return RawTensor.from_array("x", dtype, np.zeros(shape, kinds[dtype]))


def gptq_parts() -> Parts:
    return {
        "qweight": plane("I32", K // 8, N),
        "qzeros": plane("I32", G, N // 8),
        "scales": plane("F16", G, N),
        "g_idx": RawTensor.from_array("x", "I32", (np.arange(K) // 32).astype("<i4")),
        "bias": plane("F16", N),
    }


def gemm_parts() -> Parts:
    return {"qweight": plane("I32", K, N // 8), "qzeros": plane("I32", G, N // 8), "scales": plane("F16", G, N), "bias": plane("F16", N)}


def gemv_parts() -> Parts:
    return {"qweight": plane("I32", N, K // 8), "qzeros": plane("I32", N, 4), "scales": plane("F16", N, 32)}


def marlin_parts() -> Parts:
    return {"B": plane("I32", 8, 2 * N), "s": plane("F16", 1, N)}


def fast_parts() -> Parts:
    return {"qweight": plane("I16", N // 4, 128), "qzeros": plane("F16", 32, N), "scales": plane("F16", 32, N)}


def awq_marlin_parts() -> Parts:
    return {"qweight": plane("I32", 8, 2 * N), "scales": plane("F16", 1, N)}


GPTQ: Config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
MARLIN: Config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "is_marlin_format": True}
GEMM: Config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GEMV: Config = GEMM | {"version": "gemv"}
FAST: Config = GEMM | {"version": "gemv_fast"}
AUTOROUND: Config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}


def without(*leaves: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for leaf in leaves:
            del parts[leaf]

    return change


def put(leaf: str, raw: RawTensor) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[leaf] = raw

    return change


def index(values: np.ndarray[Any, Any]) -> RawTensor:
    return RawTensor.from_array("x", "I32", values.astype("<i4"))


def both(*changes: Callable[[Parts], None]) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for one in changes:
            one(parts)

    return change


def become(make: Callable[[], Parts]) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.clear()
        parts.update(make())

    return change


KEEP: Callable[[Parts], None] = lambda parts: None  # noqa: E731

GPTQ_CASES: list[tuple[str, Callable[[Parts], None], Config, str]] = [
    ("no qzeros", without("qzeros"), GPTQ, "missing-qzeros"),
    ("no scales", without("scales"), GPTQ, "missing-scales"),
    ("no qweight", without("qweight"), GPTQ, "missing-qweight"),
    ("float qweight", put("qweight", plane("F32", K // 8, N)), GPTQ, "wrong-dtype"),
    ("float qzeros", put("qzeros", plane("F32", G, N // 8)), GPTQ, "wrong-dtype"),
    ("mixed words", put("qzeros", plane("I16", G, N // 4)), GPTQ, "wrong-dtype"),
    ("integer scales", put("scales", plane("I16", G, N)), GPTQ, "wrong-dtype"),
    ("float g_idx", put("g_idx", plane("F32", K)), GPTQ, "wrong-dtype"),
    ("integer bias", put("bias", plane("I16", N)), GPTQ, "wrong-dtype"),
    ("flat qweight", put("qweight", plane("I32", K * N // 8)), GPTQ, "wrong-shape"),
    ("empty scales", put("scales", plane("F16", 0, N)), GPTQ, "wrong-shape"),
    ("qzeros of other groups", put("qzeros", plane("I32", G + 1, N // 8)), GPTQ, "wrong-shape"),
    ("qzeros too narrow", put("qzeros", plane("I32", G, N // 8 - 1)), GPTQ, "wrong-shape"),
    ("scales of other outputs", put("scales", plane("F16", G, N + 1)), GPTQ, "wrong-shape"),
    ("bias of other outputs", put("bias", plane("F16", N - 1)), GPTQ, "wrong-shape"),
    ("matrix g_idx", put("g_idx", plane("I32", 2, K)), GPTQ, "wrong-shape"),
    ("g_idx of other inputs", put("g_idx", plane("I32", K + 40)), GPTQ, "wrong-shape"),
    ("negative g_idx", put("g_idx", index(np.full(K, -1))), GPTQ, "g-idx-range"),
    ("g_idx beyond the groups", put("g_idx", index(np.arange(K) % 4)), GPTQ, "g-idx-range"),
    ("config of other bits", KEEP, GPTQ | {"bits": 8}, "bits-disagree"),
    ("config of other bits, no g_idx", without("g_idx"), GPTQ | {"bits": 2}, "bits-disagree"),
    ("config of another group", KEEP, GPTQ | {"group_size": 64}, "group-size"),
    ("no group in the config", both(put("scales", plane("F16", 5, N)), put("qzeros", plane("I32", 5, 8))), {"bits": 4}, "group-size"),
    ("group zero", KEEP, GPTQ | {"group_size": 0}, "config-value"),
    ("group minus two", KEEP, GPTQ | {"group_size": -2}, "config-value"),
    ("bits as text", KEEP, GPTQ | {"bits": "4"}, "config-value"),
    ("bits true", KEEP, GPTQ | {"bits": True}, "config-value"),
    ("sym as text", KEEP, GPTQ | {"sym": "yes"}, "config-value"),
    ("dynamic as a list", KEEP, GPTQ | {"dynamic": [".*"]}, "config-value"),
    ("dynamic broken regex", KEEP, GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, "config-value"),
    ("dynamic value a number", KEEP, GPTQ | {"dynamic": {"m": 8}}, "config-value"),
    ("skipped by a rule", KEEP, GPTQ | {"dynamic": {"-:m": {}}}, "config-disagrees"),
    ("two labels", KEEP, GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "config-disagrees"),
    ("AWQ planes", become(gemm_parts), GPTQ, "config-disagrees"),
    ("GEMV planes", become(gemv_parts), GPTQ, "config-disagrees"),
    ("planar blocks cut off", both(without("bias"), put("qweight", plane("I32", 9, 72)), put("qzeros", plane("I32", G, 7)),
     put("scales", plane("F16", G, 72))), GPTQ | {"bits": 3, "checkpoint_format": "gptq_p"}, "wrong-shape"),
    ("6 bits of an unknown writer", both(put("qweight", plane("I32", 18, N)), put("qzeros", plane("I32", G, 12))),
     GPTQ | {"bits": 6}, "gptq-width"),
    ("unknown label", KEEP, GPTQ | {"checkpoint_format": "gptq_v9"}, "gptq-version"),
    ("Marlin", KEEP, GPTQ | {"checkpoint_format": "marlin"}, "gptq-marlin"),
    ("Marlin flag", KEEP, GPTQ | {"is_marlin_format": True}, "gptq-marlin"),
    ("BitBLAS", KEEP, GPTQ | {"format": "bitblas"}, "gptq-bitblas"),
    ("Marlin as the method", KEEP, GPTQ | {"quant_method": "marlin"}, "gptq-marlin"),
    ("Marlin without scales", both(become(marlin_parts), without("s")), MARLIN, "missing-s"),
    ("Marlin without words", both(become(marlin_parts), without("B")), MARLIN, "missing-B"),
    ("Marlin of other outputs", both(become(marlin_parts), put("B", plane("I32", 8, N))), MARLIN, "wrong-shape"),
    ("Marlin of half a tile", both(become(marlin_parts), put("B", plane("I32", 8, 64)), put("s", plane("F16", 1, 32))), MARLIN,
     "wrong-shape"),
    ("Marlin with float words", both(become(marlin_parts), put("B", plane("F32", 8, 2 * N))), MARLIN, "wrong-dtype"),
    ("Marlin of another group", become(marlin_parts), MARLIN | {"group_size": 64}, "group-size"),
    ("Marlin of 8 bits", become(marlin_parts), MARLIN | {"bits": 8}, "config-disagrees"),
    ("Marlin with zero points", both(become(marlin_parts), put("qzeros", plane("I32", 1, 8))), MARLIN, "unknown-part"),
    ("Marlin bias of other outputs", both(become(marlin_parts), put("bias", plane("F16", 3))), MARLIN, "wrong-shape"),
    ("2:4 sparse Marlin", KEEP, GPTQ | {"checkpoint_format": "marlin_24"}, "gptq-marlin_24"),
    ("QQQ", KEEP, GPTQ | {"quant_method": "qqq"}, "gptq-qqq"),
    ("another kind of part", put("lora_A", plane("F16", 4, K)), GPTQ, "unknown-part"),
    ("AutoRound unknown packing", KEEP, AUTOROUND | {"packing_format": "auto_round:secret"}, "autoround-packing"),
    ("AutoRound for llm-compressor", KEEP, AUTOROUND | {"packing_format": "auto_round:llm_compressor"}, "autoround-packing"),
    ("AutoRound float grid", KEEP, AUTOROUND | {"data_type": "mx_fp"}, "autoround-data-type"),
    ("AutoRound activations", KEEP, AUTOROUND | {"act_bits": 8}, "activation-quantized"),
    ("AutoRound extra_config a list", KEEP, AUTOROUND | {"extra_config": ["m"]}, "config-value"),
    ("AutoRound left in 16 bits", KEEP, AUTOROUND | {"extra_config": {"m": {"bits": 16}}}, "config-disagrees"),
]  # fmt: skip

AWQ_CASES: list[tuple[str, Callable[[], Parts], Callable[[Parts], None], Config, str]] = [
    ("no qzeros", gemm_parts, without("qzeros"), GEMM, "missing-qzeros"),
    ("no scales", gemm_parts, without("scales"), GEMM, "missing-scales"),
    ("no qweight", gemm_parts, without("qweight"), GEMM, "missing-qweight"),
    ("byte qweight", gemm_parts, put("qweight", plane("U8", K, N // 2)), GEMM, "wrong-dtype"),
    ("float qzeros", gemm_parts, put("qzeros", plane("F16", G, N)), GEMM, "wrong-dtype"),
    ("integer scales", gemm_parts, put("scales", plane("I32", G, N)), GEMM, "wrong-dtype"),
    ("flat scales", gemm_parts, put("scales", plane("F16", G * N)), GEMM, "wrong-shape"),
    ("qzeros of other groups", gemm_parts, put("qzeros", plane("I32", G - 1, N // 8)), GEMM, "wrong-shape"),
    ("scales of other outputs", gemm_parts, put("scales", plane("F16", G, N + 9)), GEMM, "wrong-shape"),
    ("bias of other outputs", gemm_parts, put("bias", plane("F16", N + 1)), GEMM, "wrong-shape"),
    ("outputs not a multiple of 8", gemm_parts, both(put("scales", plane("F16", G, N - 3)), without("bias")), GEMM, "wrong-shape"),
    ("config of another group", gemm_parts, KEEP, GEMM | {"group_size": 64}, "group-size"),
    ("groups do not divide", gemm_parts, put("scales", plane("F16", 4, N)), GEMM, "group-size"),
    ("config of other bits", gemm_parts, KEEP, GEMM | {"bits": 8}, "bits-disagree"),
    ("bits as a float", gemm_parts, KEEP, GEMM | {"bits": 4.0}, "config-value"),
    ("skip list as text", gemm_parts, KEEP, GEMM | {"modules_to_not_convert": "m"}, "config-value"),
    ("GPTQ planes", gptq_parts, without("g_idx"), GEMM, "config-disagrees"),
    ("GEMV planes as GEMM", gemv_parts, KEEP, GEMM, "config-disagrees"),
    ("GEMM planes as GEMV", gemm_parts, KEEP, GEMV, "config-disagrees"),
    ("g_idx beside AWQ planes", gemm_parts, put("g_idx", plane("I32", K)), GEMM, "unknown-part"),
    ("GEMV scales not padded", gemv_parts, put("scales", plane("F16", N, G)), GEMV, "wrong-shape"),
    ("GEMV qzeros not padded", gemv_parts, put("qzeros", plane("I32", N, 1)), GEMV, "wrong-shape"),
    ("GEMV without group", gemv_parts, KEEP, {"quant_method": "awq", "bits": 4, "version": "gemv"}, "group-size"),
    ("GEMV of 8 bits", gemv_parts, KEEP, GEMV | {"bits": 8}, "awq-gemv-bits"),
    ("16-bit words", gemm_parts, put("qweight", plane("I16", N // 4, K)), GEMM, "config-disagrees"),
    ("GEMM words as GEMV_FAST", gemm_parts, KEEP, GEMM | {"version": "GEMV_FAST"}, "wrong-dtype"),
    ("GEMM words as llm-awq", gemm_parts, KEEP, GEMM | {"backend": "llm-awq"}, "wrong-dtype"),
    ("GEMM words as Marlin", gemm_parts, without("qzeros"), GEMM | {"version": "marlin"}, "wrong-shape"),
    ("GEMV_FAST without zeros", fast_parts, without("qzeros"), FAST, "missing-qzeros"),
    ("GEMV_FAST with integer zeros", fast_parts, put("qzeros", plane("I32", 32, N)), FAST, "wrong-dtype"),
    ("GEMV_FAST with zeros of another dtype", fast_parts, put("qzeros", plane("F32", 32, N)), FAST, "wrong-dtype"),
    ("GEMV_FAST not padded", fast_parts, both(put("qzeros", plane("F16", 4, N)), put("scales", plane("F16", 4, N))), FAST, "wrong-shape"),
    ("GEMV_FAST of other outputs", fast_parts, put("scales", plane("F16", 32, N + 4)), FAST, "wrong-shape"),
    ("GEMV_FAST of half a block", fast_parts, put("qweight", plane("I16", N // 4, 96)), FAST, "wrong-shape"),
    ("GEMV_FAST of 8 bits", fast_parts, KEEP, FAST | {"bits": 8}, "awq-fast-bits"),
    ("GEMV_FAST with values in its padding", fast_parts, put("qzeros", RawTensor.from_array("x", "F16", np.ones((32, N), "<f2"))), FAST,
     "padding"),
    ("Marlin of 8 bits", awq_marlin_parts, KEEP, GEMM | {"version": "marlin", "group_size": 128, "bits": 8}, "awq-marlin-bits"),
    ("Marlin with zero points", awq_marlin_parts, put("qzeros", plane("I32", 1, 8)), GEMM | {"version": "marlin"}, "unknown-part"),
    ("Marlin of another group", awq_marlin_parts, KEEP, GEMM | {"version": "marlin"}, "group-size"),
    ("BitBLAS", gemm_parts, KEEP, GEMM | {"version": "bitblas"}, "awq-bitblas"),
    ("unknown version", gemm_parts, KEEP, GEMM | {"version": "gemx"}, "awq-version"),
    ("two versions", gemm_parts, KEEP, GEMM | {"format": "gemv"}, "config-disagrees"),
    ("8 bits of an unknown writer", gemm_parts, both(put("qweight", plane("I32", K, 16)), put("qzeros", plane("I32", G, 16))),
     GEMM | {"bits": 8}, "awq-order"),
]  # fmt: skip


def refuse(format: Any, parts: Parts, config: Config, code: str, headers_only: bool) -> None:
    with pytest.raises(QFormatError) as caught:
        match = format.detect(config, [f"m.{leaf}" for leaf in parts]) or Match(format.NAME, config)
        module = Module("m", parts, match)
        format.scheme(module)
        assert not headers_only, "the header should have been enough"
        format.read(module)
    assert caught.value.code == code, caught.value
    assert isinstance(caught.value, BadFile | Unsupported)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("change", "config", "code"), [case[1:] for case in GPTQ_CASES], ids=[case[0] for case in GPTQ_CASES])
def test_gptq(change: Callable[[Parts], None], config: Config, code: str) -> None:
    parts = gptq_parts()
    change(parts)
    refuse(gptq, parts, config, code, headers_only=code != "g-idx-range")


@pytest.mark.parametrize(("make", "change", "config", "code"), [case[1:] for case in AWQ_CASES], ids=[case[0] for case in AWQ_CASES])
def test_awq(make: Callable[[], Parts], change: Callable[[Parts], None], config: Config, code: str) -> None:
    parts = make()
    change(parts)
    refuse(awq, parts, config, code, headers_only=True)


def test_the_unbroken_modules_are_read() -> None:
    assert gptq.read(Module("m", gptq_parts(), Match("gptq", GPTQ))).shape == (N, K)
    assert awq.read(Module("m", gemm_parts(), Match("awq", GEMM))).shape == (N, K)
    assert awq.read(Module("m", gemv_parts(), Match("awq", GEMV))).shape == (N, K)

"""ggml blocks decoded one element at a time in plain Python, straight from the layouts in llama.cpp's ggml-common.h and ggml-quants.c.

Each function takes the bytes of one block of 256 (32 for MXFP4) weights and returns plain lists: codes, and the integer planes beside
them. Shares no code with qformats; ``test_gallery`` builds canonical tensors from these and compares with ``gguf.quants``.
"""

from __future__ import annotations

import struct


def half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def q2_k(block: bytes) -> dict[str, list[float]]:
    """scales[16] (low nibble scale, high nibble min), qs[64], d, dmin."""
    scales, qs = block[:16], block[16:80]
    codes = [qs[32 * (e // 128) + e % 32] >> 2 * (e % 128 // 32) & 3 for e in range(256)]
    sc, m = [s & 15 for s in scales], [s >> 4 for s in scales]
    return {"codes": codes, "sc": sc, "m": m, "d": [half(block, 80)], "dmin": [half(block, 82)]}


def q3_k(block: bytes) -> dict[str, list[float]]:
    """hmask[32], qs[64], scales[12] (6 bits each, split 4 + 2), d. Codes 0..7 stand for code - 4."""
    hmask, qs, scales = block[:32], block[32:96], block[96:108]
    low = [qs[32 * (e // 128) + e % 32] >> 2 * (e % 128 // 32) & 3 for e in range(256)]
    codes = [low[e] + 4 * (hmask[e % 32] >> (e // 32) & 1) for e in range(256)]
    sc = [(scales[i % 8] >> 4 * (i // 8) & 15) + 16 * (scales[8 + i % 4] >> 2 * (i // 4) & 3) for i in range(16)]
    return {"codes": codes, "sc": sc, "d": [half(block, 108)]}


def q6_k(block: bytes) -> dict[str, list[float]]:
    """ql[128], qh[64], scales int8[16], d. Codes 0..63 stand for code - 32."""
    ql, qh = block[:128], block[128:192]
    codes = []
    for e in range(256):
        part, quarter, lane = e // 128, e % 128 // 32, e % 32
        nibble = ql[64 * part + 32 * (quarter % 2) + lane] >> 4 * (quarter // 2) & 15
        codes.append(nibble + 16 * (qh[32 * part + lane] >> 2 * quarter & 3))
    return {"codes": codes, "sc": list(struct.unpack_from("16b", block, 192)), "d": [half(block, 208)]}


def iq2_s(block: bytes) -> dict[str, list[float]]:
    """d, qs[32], signs[32], qh[8] (two high bits an entry), scales[8] (a nibble for 16 weights)."""
    qs, signs, qh, scales = block[2:34], block[34:66], block[66:74], block[74:82]
    codes = [qs[g] + 256 * (qh[g // 4] >> 2 * (g % 4) & 3) for g in range(32)]
    s4 = [scales[b // 2] >> 4 * (b % 2) & 15 for b in range(16)]
    return {"codes": codes, "signs": list(signs), "s4": s4, "d": [half(block, 0)]}


def iq1_m(block: bytes) -> dict[str, list[float]]:
    """qs[32], qh[16] (a nibble for 8 weights: 3 high bits, sign of the delta), 4 words of four 3-bit scales under a nibble of d."""
    qs, qh, words = block[:32], block[32:48], struct.unpack_from("<4H", block, 48)
    nibbles = [qh[g // 2] >> 4 * (g % 2) & 15 for g in range(32)]
    codes = [qs[g] + 256 * (nibbles[g] & 7) for g in range(32)]
    delta = [-0.125 if n & 8 else 0.125 for n in nibbles]
    bits = sum((word >> 12) << 4 * i for i, word in enumerate(words))
    return {
        "codes": codes,
        "delta": delta,
        "s3": [words[b // 4] >> 3 * (b % 4) & 7 for b in range(16)],
        "d": [half(struct.pack("<H", bits), 0)],
    }


def tq1_0(block: bytes) -> dict[str, list[float]]:
    """qs[48] (five base-3 digits a byte), qh[4] (four digits), d. Codes 0..2 stand for code - 1."""
    codes = []
    for start, lanes, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        codes += [(block[start + lane] * 3**digit % 256) * 3 >> 8 for digit in range(digits) for lane in range(lanes)]
    return {"codes": codes, "d": [half(block, 52)]}


def mxfp4(block: bytes) -> dict[str, list[float]]:
    """e (a power of two, e8m0), qs[16]: byte j holds elements j (low nibble) and j + 16."""
    return {"codes": [block[1 + e % 16] >> 4 * (e // 16) & 15 for e in range(32)], "e": [block[0]]}

"""PTX's scalar types in NumPy: registers hold bits, instructions read and write values.

f16 and f32 are NumPy types, bf16 is a float32 with the same value, and the packed pairs f16x2 and bf16x2 have one more
axis of length two, so an instruction written for single numbers applies to pairs.
"""

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}

TYPE_BITS = (
    {f"{kind}{bits}": bits for kind in "bus" for bits in UNSIGNED}
    | {"f16": 16, "f32": 32, "f64": 64, "bf16": 16, "f16x2": 32, "bf16x2": 32, "tf32": 32, "pred": 1}
)  # fmt: skip


PLAIN = {type: np.dtype(dtype) for type, dtype in FLOATS.items()} | {
    f"{kind}{bits}": np.dtype((SIGNED if kind == "s" else UNSIGNED)[bits]) for kind in "bus" for bits in UNSIGNED
}
"""Types whose values numpy sees in the bits themselves."""


def is_float(type: str) -> bool:
    return type[0] == "f" or type in ("bf16", "bf16x2", "tf32")


def decode(bits: np.ndarray, type: str) -> np.ndarray:
    """Values of `bits`, unsigned integers as wide as the type."""
    match type:
        case "pred":
            return bits
        case "bf16":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        case "bf16x2":
            return decode(_halves(bits), "bf16")
        case "f16x2":
            return _halves(bits).view(np.float16)
        case "tf32":  # the multiplier ignores the low 13 bits
            return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if type[0] == "f":
        return bits.view(FLOATS[type])
    return bits.view(SIGNED[TYPE_BITS[type]]) if type[0] == "s" else bits


def encode(values: np.ndarray, type: str) -> np.ndarray:
    """Bits of values, rounded to nearest even if the type is narrower."""
    values = np.asarray(values)
    match type:
        case "pred":
            return values.astype(bool, copy=False)
        case "bf16":
            return _round_to_bf16(values)
        case "bf16x2":
            return _pair(_round_to_bf16(values))
        case "f16x2":
            return _pair(values.astype(np.float16).view(np.uint16))
        case "tf32":  # cvt.rna: to nearest, ties away from zero
            return (values.astype(np.float32).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    if type[0] == "f":
        return values.astype(FLOATS[type], copy=False).view(UNSIGNED[TYPE_BITS[type]])
    return values.astype(UNSIGNED[TYPE_BITS[type]], copy=False)


def resize(bits: np.ndarray, width: int, signed: bool = False) -> np.ndarray:
    """Truncates to `width` bits, or extends by zeros or the sign."""
    have = bits.dtype.itemsize * 8
    if bits.dtype == bool or have == width:
        return bits
    if signed and have < width:
        return bits.view(SIGNED[have]).astype(SIGNED[width]).view(UNSIGNED[width])
    return bits.astype(UNSIGNED[width])


def _round_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.asarray(values, np.float32).view(np.uint32)
    if values.dtype == np.float64:  # round to odd first: avoids the error of double rounding
        nearest = bits.view(np.float32).astype(np.float64)
        away = np.where(np.abs(nearest) < np.abs(values), 1, -1)
        bits = (bits + np.where((nearest != values) & (bits & 1 == 0), away, 0)).astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _halves(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits)[..., None].view(np.uint16)


def _pair(halves: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]

"""The GGUF format: types, limits, and what is allowed, for those who read and write headers.

A GGUF file is, in little-endian order and without gaps::

    "GGUF" · u32 version · u64 tensor count · u64 metadata count
    metadata   key: string · u32 value type · value
    tensors    name: string · u32 n · n x u64 dimension, innermost first · u32 type · u64 offset
    zeros up to a multiple of general.alignment (32 where it is not given)
    data       every tensor at its offset from here, which is a multiple of the alignment

A string is a u64 length and UTF-8; an array is a u32 element type, a u64 count and the elements
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import struct
from collections.abc import Sequence

from zaya_quant.spec import BLOCK_TYPES

_FLOAT_TYPES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}
_TYPE_IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q3_K": 11,
    "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30,
}  # fmt: skip
# Type name: type id, weights per block, bytes per block.
GGML_TYPES: dict[str, tuple[int, int, int]] = {
    name: (number, *(_FLOAT_TYPES | BLOCK_TYPES)[name]) for name, number in _TYPE_IDS.items()
}
TYPE_NAMES = {number: name for name, (number, _, _) in GGML_TYPES.items()}
# Types that exist, or once did, and are not read here: an error should call them by their name.
OTHER_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 10: "Q2_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

MAX_HEADER_BYTES = 64 << 20  # held while reading; the largest tokenizers need a quarter of it
MAX_TENSORS = 1 << 15
MAX_KEYS = 1 << 14
MAX_KEY_BYTES = 4 << 20  # of all keys together
MAX_STRINGS = 3 << 19  # in all arrays of a file together; each costs some 80 bytes in memory
MAX_NUMBERS = 1 << 22  # likewise; 8 to 32 bytes
MAX_NAME = 63  # ggml keeps names in 64 bytes, the last of them 0
MAX_KEY = (1 << 16) - 1
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
# Of a model in several files: which of them this is, of how many, and the tensors in all.
NUMBER_KEY, COUNT_KEY, TOTAL_KEY = "split.no", "split.count", "split.tensors.count"
SHOWN = 80  # bytes of a refused key

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

_STRING, ARRAY = 8, 9
# Kind of a scalar: type id, struct code. The kind of an array is its elements' in brackets.
SCALARS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"),
    "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"),
    "f64": (12, "d"),
}  # fmt: skip
KIND_IDS = {kind: number for kind, (number, _) in SCALARS.items()} | {"str": _STRING}
KIND_NAMES = {number: kind for kind, number in KIND_IDS.items()}

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
START = struct.Struct("<4sIQQ")


def aligned(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment


def type_problem(dtype: str) -> str:
    """Why no tensor may have this type, or ""."""
    if dtype in GGML_TYPES:
        return ""
    return f"is {dtype}, which is not supported; supported: {', '.join(GGML_TYPES)}"


def shape_problem(dtype: str, shape: Sequence[int]) -> str:
    """Why no tensor of this type may have this shape, or ""."""
    if not 1 <= len(shape) <= MAX_DIMS:
        return f"has {len(shape)} dimensions; 1 to {MAX_DIMS} are allowed"
    if min(shape) < 1:
        return f"has an empty dimension in its shape {list(shape)}"
    _, per_block, block_bytes = GGML_TYPES[dtype]
    if math.prod(shape) * block_bytes >= 1 << 63:  # bounds the bytes as well
        return f"has too many elements: shape {list(shape)}"
    if shape[-1] % per_block:
        return f"has rows of {shape[-1]} values; {dtype} needs a multiple of {per_block}"
    return ""


def data_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size of a tensor's data."""
    _, per_block, block_bytes = GGML_TYPES[dtype]
    return math.prod(shape) // per_block * block_bytes


def name_problem(name: str) -> str:
    """Why no tensor may be called this, or ""."""
    size = len(name.encode("utf-8", "surrogatepass"))
    if not 1 <= size <= MAX_NAME:
        return f"has a name of {size} bytes; 1 to {MAX_NAME} are allowed"
    # not only NUL and control characters, but also those that turn a terminal's text around
    return "" if name.isprintable() else "has unprintable characters in its name"


def key_problem(key: str) -> str:
    """Why no key may be this, or ""."""
    if not 1 <= len(key) <= MAX_KEY:
        return f"has {len(key)} bytes; 1 to {MAX_KEY} are allowed"
    return "" if key.isascii() and key.isprintable() else "is not printable ASCII"


def alignment_problem(alignment: int) -> str:
    """Why offsets cannot be aligned so, or ""."""
    if 8 <= alignment <= 1 << 16 and alignment & (alignment - 1) == 0:
        return ""
    return f"is {alignment}; a power of two from 8 to 65536 is allowed"

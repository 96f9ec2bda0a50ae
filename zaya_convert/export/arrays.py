"""What an output file is made of: arrays of known size, and the regions that steps fill."""

from dataclasses import dataclass

from zaya_convert.headers import DTYPE_BYTES
from zaya_quant.spec import BLOCK_TYPES


@dataclass(frozen=True, slots=True)
class Array:
    """One array of the output file. ``dtype`` is a safetensors name or a ggml block type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Exact size."""
        return size_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Region:
    """The bytes of an output array that one component of a step fills."""

    array: Array
    offset: int
    bytes: int


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array; rows of a block type are whole blocks."""
    weights, size = BLOCK_TYPES.get(dtype) or (1, DTYPE_BYTES[dtype])
    count = 1
    for dim in shape:
        count *= dim
    return count // weights * size


def piece_of(
    array: Array, expert: int | None = None, rows: tuple[int, int] | None = None
) -> Region:
    """The region of a whole array, of one expert of it, or of a range of that one's rows."""
    offset, size = 0, array.bytes
    if expert is not None:
        size //= array.shape[0]
        offset = expert * size
    if rows is not None:
        row = size // array.shape[-2]
        offset, size = offset + rows[0] * row, (rows[1] - rows[0]) * row
    return Region(array, offset, size)

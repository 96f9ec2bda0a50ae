"""What an output file is made of: arrays of known size, and the regions that steps fill."""

from collections.abc import Iterator
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
    """The bytes of an output array that one component of a step fills.

    Attributes:
        bytes: how many it fills, gaps not counted.
        row, step: where several components take turns row by row, the bytes of one of its rows and
            the distance to its next; 0 when the region is one run of bytes.
    """

    array: Array
    offset: int
    bytes: int
    row: int = 0
    step: int = 0

    def runs(self, begin: int, size: int) -> Iterator[tuple[int, int]]:
        """Where ``size`` bytes of the region from ``begin`` on lie: (offset in array, bytes)."""
        end = begin + size
        while begin < end:
            row, inside = divmod(begin, self.row) if self.step else (0, begin)
            count = min(self.row - inside if self.step else size, end - begin)
            yield self.offset + row * self.step + inside, count
            begin += count


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array; rows of a block type are whole blocks."""
    weights, size = BLOCK_TYPES.get(dtype) or (1, DTYPE_BYTES[dtype])
    count = 1
    for dim in shape:
        count *= dim
    return count // weights * size


def piece_of(
    array: Array,
    expert: int | None = None,
    rows: tuple[int, int] | None = None,
    turn: tuple[int, int] = (0, 1),
) -> Region:
    """The region of a whole array, of one expert of it, or of some of that one's rows.

    Args:
        rows: a range of them.
        turn: (i, n) takes every n-th row, beginning with row i.
    """
    offset, size = 0, array.bytes
    if expert is not None:
        size //= array.shape[0]
        offset = expert * size
    if rows is not None:
        row = size // array.shape[-2]
        offset, size = offset + rows[0] * row, (rows[1] - rows[0]) * row
    first, turns = turn
    if turns == 1:
        return Region(array, offset, size)
    row = size // array.shape[-2]
    return Region(array, offset + first * row, size // turns, row, turns * row)

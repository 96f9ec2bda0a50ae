"""What an output file is made of: arrays of known size, and the regions that steps fill."""

from dataclasses import dataclass

from zaya_convert.headers import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Array:
    """One array of the output file. ``dtype`` is a safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Exact size."""
        count = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            count *= dim
        return count


@dataclass(frozen=True, slots=True)
class Region:
    """The bytes of an output array that one component of a step fills."""

    array: Array
    offset: int
    bytes: int

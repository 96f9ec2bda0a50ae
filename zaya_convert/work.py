"""The work on one step of a plan: read, check, quantize, encode, write, record.

A record is what the journal keeps of a finished step, and what the manifest is made of:
``source`` (BLAKE3 of the tensor as it was read), ``written`` (sha256 of each region), ``widened``
(its scales had to be bf16), ``narrow`` (they should be, but the packing holds fp16 only) and
``fallback`` (why it was rounded without calibration, or "").
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from zaya_convert.checkpoint import CHUNK_BYTES, TensorInfo, torch_dtype
from zaya_convert.errors import InputError
from zaya_convert.export import packing
from zaya_convert.export.container import PlannedFiles
from zaya_convert.plan import Plan, Step
from zaya_quant.methods import METHODS, method
from zaya_quant.qtensor import Quantized, QuantTensor
from zaya_quant.spec import QuantSpec, Spec
from zaya_quant.stats import InputStats

if TYPE_CHECKING:
    from zaya_quant.methods import Quantize

_FP16_NORMAL = 2.0**-14
NO_TOKENS = "no calibration tokens"

Record = dict[str, Any]


@dataclass(frozen=True)
class Worker:
    """Carries out steps; safe from any thread."""

    plan: Plan
    files: PlannedFiles

    def run(self, step: Step) -> Record:
        """A step that needs nothing but its own tensor (and second moments, if its method does).

        Raises:
            InputError: values that are not finite or cannot be represented.
        """
        if step.copy:
            return self._copy(step)
        if self._fits_in_rows(step):
            return self._by_rows(step)
        value = self.plan.source.read_stored(step.key)
        digest = blake3(view(value)).hexdigest() if isinstance(value, torch.Tensor) else ""
        info = self.plan.source.infos[step.key]
        if step.key in self.plan.source.scaling:
            value = self.plan.source.scaling[step.key].of(value)
        if step.spec is None:
            value = self._floats(step, value)
        elif isinstance(value, torch.Tensor):
            return self.finish(step, self.quantize(step, value, self._known(step)), digest)
        else:
            check_finite(value.parameters(), info)
        return self._write(step, value, digest, widened=False)

    def check(self, step: Step) -> str:
        """Only read a step's tensor: its BLAKE3 digest.

        Raises:
            InputError: values that are not finite.
        """
        value = self.plan.source.read_stored(step.key)
        assert isinstance(value, torch.Tensor)
        check_finite(value.flatten(), self.plan.source.infos[step.key])
        return blake3(view(value)).hexdigest()

    def _fits_in_rows(self, step: Step) -> bool:
        """Whether a large matrix can be made a few rows at a time, each for itself."""
        info = self.plan.source.infos[step.key]
        return (
            info.bytes > CHUNK_BYTES
            and info.plain
            and len(info.shape) == 2
            and packing(self.plan.packing).by_rows
            and step.key not in self.plan.source.scaling
        )

    def _by_rows(self, step: Step) -> Record:
        """A step whose rows are read, made and written in bounded pieces.

        Where some of them need wider scales, all of them are made once more.
        """
        info, spec = self.plan.source.infos[step.key], step.spec
        wider = None if spec is None else self._wider(info, spec)
        found = self._rows(step, spec, strict=wider is not None)
        found = found or self._rows(step, wider, strict=False) | {"widened": True}
        return found | {"fallback": self._fallback(step)}

    def _rows(self, step: Step, spec: Spec | None, strict: bool) -> Record:
        """Make a step's rows on a grid; {} when it is ``strict`` and the grid too narrow."""
        info, known = self.plan.source.infos[step.key], self._known(step) if spec else None
        dtype, columns = torch_dtype(info.dtype), info.shape[1]
        row = columns * dtype.itemsize
        source, begin, narrow = blake3(), 0, False
        written = {name: (hashlib.sha256(), 0) for name in step.regions}
        for chunk in self.plan.source.chunks(step.key, max(1, CHUNK_BYTES // row) * row):
            source.update(chunk)
            rows = torch.frombuffer(chunk, dtype=dtype).view(-1, columns)
            if spec is None:
                value = self._floats(step, rows, begin)
            else:
                found = self._attempt(step, spec, rows, known, begin)
                if strict and (found is None or _too_small(found)):
                    return {}
                value = found or self._surely(step, spec, rows, known)
                narrow |= _loses_bits(value)
            for name, tensor in packing(self.plan.packing).encode(info, value).items():
                data, (digest, offset) = view(tensor), written[name]
                self.files.write(step.regions[name], data, offset)
                digest.update(data)
                written[name] = (digest, offset + len(data))
            begin += len(chunk)
        digests = [digest.hexdigest() for digest, _ in written.values()]
        return _record(step, source.hexdigest(), digests) | {"narrow": narrow}

    def _floats(self, step: Step, value: torch.Tensor | Quantized, offset: int = 0) -> torch.Tensor:
        """A float tensor in the dtype it is stored in.

        Args:
            offset: bytes of the tensor before ``value``.

        Raises:
            InputError: values that are not finite, or not in that dtype.
        """
        info = self.plan.source.infos[step.key]
        dtype = next(iter(step.regions.values())).array.dtype
        if not isinstance(value, torch.Tensor):
            check_finite(value.parameters(), info)
            value = value.dequantize()
        check_finite(value.flatten(), info, offset)
        result = value.to(torch_dtype(dtype))
        if not bool(torch.isfinite(result).all()):
            largest = float(value.abs().max())
            raise InputError(f"{where(info)}: {largest:g} does not fit {dtype}; use BF16 or F32")
        return result

    def quantize(self, step: Step, weight: torch.Tensor, stats: InputStats | None) -> Quantized:
        """Quantize one matrix, with bf16 scales where fp16 would overflow or lose them.

        A method whose statistics are missing gives way to ``rtn``.
        """
        assert step.spec is not None
        found = self._attempt(step, step.spec, weight, stats)
        wider = self._wider(self.plan.source.infos[step.key], step.spec)
        if wider is not None and (found is None or _too_small(found)):
            return self._surely(step, wider, weight, stats)
        return found or self._surely(step, step.spec, weight, stats)

    def _attempt(
        self,
        step: Step,
        spec: Spec,
        weight: torch.Tensor,
        stats: InputStats | None,
        offset: int = 0,
    ) -> Quantized | None:
        """A matrix, or some of its rows, on a grid; None when that has no scale for them.

        Args:
            offset: bytes of the matrix before ``weight``.
        """
        try:
            return self._method(step, stats)(weight, spec, stats)
        except ValueError:
            check_finite(weight.flatten(), self.plan.source.infos[step.key], offset)
            return None

    def _surely(
        self, step: Step, spec: Spec, weight: torch.Tensor, stats: InputStats | None
    ) -> Quantized:
        """``_attempt`` that says why it cannot."""
        try:
            return self._method(step, stats)(weight, spec, stats)
        except ValueError as error:
            info = self.plan.source.infos[step.key]
            raise InputError(f"{where(info)}: {error}") from None

    def _method(self, step: Step, stats: InputStats | None) -> Quantize:
        needs = METHODS[step.method].needs
        return method(step.method if stats is not None or not needs else "rtn")

    def _wider(self, info: TensorInfo, spec: Spec) -> Spec | None:
        """The spec with bf16 scales, if the packing can hold such."""
        if not isinstance(spec, QuantSpec) or spec.scale_dtype != "float16":
            return None
        wider = replace(spec, scale_dtype="bfloat16")
        return None if packing(self.plan.packing).problems(info, wider) else wider

    def again(self, step: Step, weight: torch.Tensor) -> Quantized:
        """What ``run`` made, or will make, of a step's matrix."""
        return self.quantize(step, weight, self._known(step))

    def finish(self, step: Step, value: Quantized, digest: str, fallback: str = "") -> Record:
        """Write what ``quantize`` made."""
        widened = value.spec != step.spec
        narrow = not widened and _loses_bits(value)
        record = self._write(step, value, digest, widened)
        return record | {"narrow": narrow, "fallback": fallback or self._fallback(step)}

    def _known(self, step: Step) -> InputStats | None:
        stats = self.plan.stats
        if stats is None or not METHODS[step.method].needs:
            return None
        known = stats.of(step.key.layer, step.key.part, step.key.expert)
        scaling = self.plan.source.scaling.get(step.key)
        if known is None or scaling is None:
            return known
        return replace(known, second_moment=scaling.of_moments(known.second_moment))

    def _fallback(self, step: Step) -> str:
        """Why a step that stands alone is rounded without its statistics, or ""."""
        row = METHODS[step.method] if step.method else None
        missing = row and row.needs and not row.on_prefix and self._known(step) is None
        return NO_TOKENS if missing else ""

    def _copy(self, step: Step) -> Record:
        (region,) = step.regions.values()
        info = self.plan.source.infos[step.key]
        read, written, offset = blake3(), hashlib.sha256(), 0
        for chunk in self.plan.source.chunks(step.key):
            check_finite(torch.frombuffer(chunk, dtype=torch_dtype(info.dtype)), info, offset)
            read.update(chunk)
            written.update(chunk)
            self.files.write(region, chunk, offset)
            offset += len(chunk)
        return _record(step, read.hexdigest(), [written.hexdigest()])

    def _write(
        self, step: Step, value: torch.Tensor | Quantized, digest: str, widened: bool
    ) -> Record:
        info = self.plan.source.infos[step.key]
        encoded = packing(self.plan.packing).encode(info, value)
        components = {name: view(tensor) for name, tensor in encoded.items()}
        for name, data in components.items():
            self.files.write(step.regions[name], data)
        written = [hashlib.sha256(components[name]).hexdigest() for name in step.regions]
        return _record(step, digest, written) | {"widened": widened}


def _record(step: Step, source: str, written: list[str]) -> Record:
    return {
        "step": str(step.key), "source": source, "written": written, "widened": False,
        "narrow": False, "fallback": "",
    }  # fmt: skip


def _too_small(value: Quantized) -> bool:
    """Whether some row has only scales below fp16's normal range, and so few bits in them.

    A subnormal scale beside normal ones of its row does no harm: its absolute error is far below
    the rounding error of those.
    """
    largest = value.scales.abs().amax(dim=1)
    return bool(((largest > 0) & (largest < _FP16_NORMAL)).any())


def _loses_bits(value: Quantized) -> bool:
    """Whether fp16 scales are too small for it. Block types expect theirs to be small."""
    return isinstance(value, QuantTensor) and _too_small(value)


def check_finite(values: torch.Tensor, info: TensorInfo, offset: int = 0) -> None:
    """Refuse NaN and infinity.

    Args:
        offset: bytes of the tensor before ``values``.

    Raises:
        InputError: naming the first one.
    """
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    first = int((~finite).nonzero()[0, 0])
    flat = offset // values.element_size() + first
    raise InputError(f"{where(info)}: value {flat} is {values[first].item()}, not a finite number")


def where(info: TensorInfo) -> str:
    """File and tensor, for messages."""
    piece = next(iter(info.pieces.values()))
    return f"{piece.file.name}: {str(info.key)!r}"


def view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

"""Fused experts in FP8 or MXFP4, as Zyphra publishes them: read as a float model.

The layout is hybrid. ``model.layers.L.mlp.experts.gate_up_proj`` and ``down_proj`` hold codes, the
tensors of these names and ``.weight_scale`` hold scales, everything else is float:

====== =============================================== =========================================
form   codes                                           scales
====== =============================================== =========================================
FP8    F8_E4M3 [E, out, in]                            F32, F16 or BF16 [E, out, 1]
MXFP4  U8 [E, out, in/2]: two E2M1, the first in the   U8 [E, out, in/32]: E8M0, 2^(byte - 127)
       low bits
====== =============================================== =========================================

value = code · scale. The tensors tell a form, not the text of ``quantization_config``. MXFP4's
names and shapes are those that a public server loads and that add up to the published size.

For every tool such a checkpoint is a float one, whose experts are decoded when they are read: FP8
as float32, because the 4 bits of a code times the 8 to 24 of a scale fit nothing smaller (only
float32 scales round, in the last bit); MXFP4 as bfloat16, which holds its values exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_convert import layout
from zaya_convert.checkpoint import Checkpoint, TensorInfo, match_tensors, piece_at, torch_dtype
from zaya_convert.config import ModelConfig, normalise
from zaya_convert.errors import InputError
from zaya_convert.files import load_tensors, read_json
from zaya_convert.headers import FLOAT_DTYPES, RawTensor
from zaya_convert.layout import PART_BY_NAME, Stored, TensorKey

if TYPE_CHECKING:
    import torch

_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.(?:gate_up|down)_proj)(.*)")
_SCALE = ".weight_scale"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits; the fourth is the sign


@dataclass(frozen=True)
class _Form:
    """How the codes and scales of a matrix are stored.

    Attributes:
        name: for people.
        codes: dtype of the array of codes.
        scales: dtypes that the array of scales may have.
        values: dtype that a decoded matrix has.
        packed: codes in one element.
        group: weights that share a scale; 0 for a whole row.
        codes_of: codes as float32 [out, in].
        scales_of: scales as float32 [out, groups].
    """

    name: str
    codes: str
    scales: tuple[str, ...]
    values: str
    packed: int
    group: int
    codes_of: Callable[[torch.Tensor], torch.Tensor]
    scales_of: Callable[[torch.Tensor], torch.Tensor]

    def shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the codes and of the scales of weights, whose columns fill whole groups."""
        *rows, columns = shape
        groups = columns // self.group if self.group else 1
        return (*rows, columns // self.packed), (*rows, groups)


def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder's fused experts are codes, in a form that is known here or in another.

    Args:
        config: its ``config.json``; without a ``quantization_config`` no file is looked at.

    Raises:
        InputError: weight files are missing or damaged.
    """
    if not isinstance(config.get("quantization_config"), dict):
        return False
    return any(
        suffix or raw.dtype not in FLOAT_DTYPES for raw, _, suffix in _fused(load_tensors(folder))
    )


def open_fused(folder: Path) -> Checkpoint:
    """Open such a folder. Reads headers only.

    Raises:
        InputError: anything missing, unknown, or of the wrong shape or dtype, all at once; or
            experts in another form, naming the tensor that gave it away.
    """
    raw = read_json(folder / "config.json")
    tensors = load_tensors(folder)
    _refuse_other_forms(folder, raw, tensors)
    config, notes = normalise(raw, "hybrid", {})
    coded, problems = _take_coded(config, tensors)
    try:
        floats, tied_copy = match_tensors(
            "hybrid", config, tensors, folder.name, skip=frozenset(coded)
        )
    except InputError as error:
        raise InputError(problems + error.problems, folder.name) from None
    if problems:
        raise InputError(problems, folder.name)
    keys = layout.keys(config.layers, config.experts, config.flags)
    infos = {key: coded.get(key) or floats[key] for key in keys}
    return Checkpoint(
        folder, "hybrid", config, raw, infos, (*notes, *_notes(infos)),
        decoder=_decode, tied_copy=tied_copy,
    )  # fmt: skip


def _fused(tensors: Mapping[str, RawTensor]) -> Iterator[tuple[RawTensor, str, str]]:
    """Everything stored for fused experts: the tensor, the layout's name and what follows it."""
    for name, raw in tensors.items():
        match = _FUSED.fullmatch(name)
        if match:
            yield raw, match[1], match[2]


def _refuse_other_forms(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, RawTensor]
) -> None:
    for raw, name, suffix in _fused(tensors):
        if suffix == _SCALE or (not suffix and raw.dtype in (*FLOAT_DTYPES, *_FORMS)):
            continue
        dtypes = {other.dtype for other, base, _ in _fused(tensors) if base == name}
        declared = "mxfp4" in str(config.get("quantization_config")).lower()
        kind = "MXFP4" if declared or dtypes <= {"U8", "F4", "F8_E8M0"} else "quantized"
        raise InputError(
            f"holds {kind} experts in a form that cannot be read ({raw.name!r} in {raw.file.name} "
            f"is {raw.dtype} {list(raw.shape)}); "
            "use Zyphra/ZAYA1-8B itself, or Zyphra/ZAYA1-8B-FP8-Experts",
            folder.name,
        )


def _take_coded(
    config: ModelConfig, tensors: dict[str, RawTensor]
) -> tuple[dict[TensorKey, TensorInfo | None], list[str]]:
    """The matrices stored as codes, whose arrays leave ``tensors``, and what is wrong with them.

    A matrix with something wrong is None: it is not missing either.
    """
    found: dict[TensorKey, TensorInfo | None] = {}
    problems: dict[str, None] = {}
    used: set[str] = set()
    for key in layout.keys(config.layers, config.experts, config.flags):
        place = layout.stored("hybrid", key, config.dims, config.layers)
        codes, scales = (tensors.get(name) for name in (place.name, place.name + _SCALE))
        if key.expert < 0 or codes is None or codes.dtype not in _FORMS:
            continue
        used |= {place.name, place.name + _SCALE}
        misfits = list(_misfits(_FORMS[codes.dtype], place, codes, scales))
        problems |= dict.fromkeys(misfits)
        found[key] = None if misfits or not scales else _info(key, place, config, codes, scales)
    for name in used:
        tensors.pop(name, None)
    return found, list(problems)


def _misfits(
    form: _Form, place: Stored, codes: RawTensor, scales: RawTensor | None
) -> Iterator[str]:
    columns = place.shape[-1]
    if form.group and columns % form.group:
        yield f"{codes.name!r} in {codes.file.name}: {form.group} does not divide {columns} inputs"
        return
    for raw, dtypes, shape in zip(
        (codes, scales), ((form.codes,), form.scales), form.shapes(place.shape), strict=True
    ):
        if raw is None:
            yield f"{place.name + _SCALE!r} is missing: {form.name} codes mean nothing without it"
        elif raw.dtype not in dtypes or raw.shape != shape:
            yield (
                f"{raw.name!r} in {raw.file.name} is {raw.dtype} {list(raw.shape)}, "
                f"expected {' or '.join(dtypes)} {list(shape)} for {form.name} experts"
            )


def _info(
    key: TensorKey, place: Stored, config: ModelConfig, codes: RawTensor, scales: RawTensor
) -> TensorInfo:
    form = _FORMS[codes.dtype]
    shape = layout.resolve(PART_BY_NAME[key.part].shape, config.dims)
    code_shape, scale_shape = form.shapes(shape)
    pieces = {
        "codes": piece_at(codes, place, code_shape),
        "scales": piece_at(scales, place, scale_shape),
    }
    return TensorInfo(key, shape, form.values, pieces)


def _notes(infos: Mapping[TensorKey, TensorInfo]) -> list[str]:
    dtypes = sorted({info.stored_dtype for info in infos.values() if not info.plain})
    return [
        f"the experts are {_FORMS[dtype].name}, read as code times scale: quantizing them rounds "
        "twice, so quantize the original checkpoint if you can"
        for dtype in dtypes
    ]


def _decode(info: TensorInfo, pieces: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values of one matrix.

    Raises:
        InputError: a scale is negative or not finite, or a value is not finite.
    """
    import torch

    form = _FORMS[info.stored_dtype]
    scales = form.scales_of(pieces["scales"])
    bad = ~torch.isfinite(scales) | (scales < 0)
    if bool(bad.any()):
        row, group = bad.nonzero()[0].tolist()
        what = f"a scale of row {row} is {scales[row, group].item()}, which no scale can be"
        raise InputError(what, _where(info, "scales"))
    codes = form.codes_of(pieces["codes"]).view(*scales.shape, -1)
    values = codes * scales[..., None]
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        row, group, column = bad.nonzero()[0].tolist()
        code, scale = codes[row, group, column].item(), scales[row, group].item()
        what = f"code {code} times scale {scale} in row {row} is not a finite number"
        raise InputError(what, _where(info, "codes"))
    return values.view(info.shape).to(torch_dtype(info.dtype))


def _where(info: TensorInfo, piece: str) -> str:
    return f"{info.pieces[piece].file.name}: {str(info.key)!r}"


def _float(stored: torch.Tensor) -> torch.Tensor:
    return stored.float()


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    import torch

    both = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    byte = torch.arange(256)
    pairs = torch.stack((both[byte & 15], both[byte >> 4]), dim=1)
    return torch.nn.functional.embedding(packed.int(), pairs).flatten(1)


def _e8m0(stored: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127): the byte is float32's exponent, but for 0 (a subnormal) and 255 (NaN)."""
    import torch

    bits = stored.int() << 23
    return bits.masked_fill_(stored == 0, 1 << 22).view(torch.float32)


_FORMS = {
    form.codes: form
    for form in (
        _Form("FP8", "F8_E4M3", FLOAT_DTYPES, "F32", 1, 0, _float, _float),
        _Form("MXFP4", "U8", ("U8",), "BF16", 2, 32, _e2m1, _e8m0),
    )
}

"""What the owner of a GPU runs: are the Triton kernels right there, how fast, with which tiles.

One report, to be sent back. Bandwidth is compared with a copy on the same device; decode takes
another expert with every call, from a bank that no cache holds, and is measured inside a CUDA (HIP)
graph and without. Tiles are tried one kind at a time, those that spill registers or do not fit left
out; the fastest over three grids become the ``tuned`` part, which ``zaya_kernels.triton.configs``
reads.
"""

from __future__ import annotations

import importlib.util
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zaya_convert import __version__
from zaya_convert.errors import InputError, UsageError
from zaya_kernels import reference
from zaya_kernels.reference import Expert
from zaya_kernels.triton import configs, launch
from zaya_kernels.triton.layout import Packed, PackedExperts, pack, pack_experts
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

Note = Callable[[str], None]
Call = Callable[[], object]

# Every form that the kernels have, and the three that are timed.
FORMS = tuple(QuantSpec(*form) for form in itertools.product((4, 8), (32, 64, 128), (True, False)))
SPECS = (QuantSpec(4, 32), QuantSpec(4, 128, False), QuantSpec(8, 32))
# Relative error of an output's norm: weights and sums rounded to the dtype of the activations.
_TOO_SLOW = 1.3  # times the tile in use, on one grid
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        width: of hidden states, and of experts.
        experts: of the bank that decode goes round.
        prefill_experts: of the bank that prompts are routed to.
        head_rows: outputs of the head.
        decode: numbers of tokens decoded at once.
        prefill: numbers of tokens of a prompt.
        copied: bytes of the copy.
        decode_tiles: tiles of decode that are tried.
        prefill_tiles: tiles of prefill that are tried.
        tuning_tokens: tokens of an expert that the two tiles of prefill are tuned on.
        seconds: to spend on one measurement.
        forms: checked for correctness.
        specs: timed, and tuned for.
    """

    width: int = 2048
    experts: int = 256
    prefill_experts: int = 16
    head_rows: int = 262272
    decode: Sequence[int] = (1, 2, 4, 8, 16)
    prefill: Sequence[int] = (32, 128, 512, 4096)
    copied: int = 1 << 30
    decode_tiles: Sequence[configs.Decode] = tuple(
        configs.Decode(*tile)
        for tile in itertools.product((1, 2, 4, 8, 16), (16, 32, 64, 128), (2, 4, 8))
    )
    prefill_tiles: Sequence[configs.Prefill] = tuple(
        configs.Prefill(*tile)
        for tile in itertools.product(
            (16, 32, 64, 128), (32, 64, 128), (2, 4, 8), (4, 8), (1, 2, 3)
        )
    )
    tuning_tokens: tuple[int, int] = (16, 256)
    seconds: float = 0.1
    forms: Sequence[QuantSpec] = FORMS
    specs: Sequence[QuantSpec] = SPECS


# Seconds in the interpreter; no time means anything at this size.
SMALL = Sizes(
    width=64, experts=2, prefill_experts=2, head_rows=80, decode=(1, 2), prefill=(20,),
    copied=1 << 20, decode_tiles=(configs.Decode(32, 32, 4),),
    prefill_tiles=(configs.Prefill(32, 32, 8, 4, 1),), tuning_tokens=(10, 40), seconds=0.0,
    forms=(QuantSpec(4, 32), QuantSpec(8, 128, False)), specs=SPECS[:1],
)  # fmt: skip


def require_device() -> str:
    """The GPU that is here, as a name for files; the interpreter is one, too.

    Raises:
        UsageError: triton is not installed.
        InputError: there is no GPU.
    """
    if importlib.util.find_spec("triton") is None:
        raise UsageError("--gpu needs triton: pip install 'zaya-convert[gpu]'")
    if launch.interpreting():
        return "interpreter"
    if not torch.cuda.is_available():
        raise InputError(
            "there is no CUDA or ROCm device that torch can use; TRITON_INTERPRET=1 with --small "
            "tries the whole measurement on the CPU, without a meaning of its times"
        )
    return configs.slug(launch.target(torch.device("cuda"))[0])


def measure(sizes: Sizes, note: Note) -> dict[str, Any]:
    """The report; ``note`` tells of progress."""
    device = torch.device("cpu" if launch.interpreting() else "cuda")
    torch.manual_seed(0)
    report: dict[str, Any] = {"device": facts(device)}
    note("correctness")
    rows = list(correctness(device, sizes.forms))
    report["correctness"] = {"rows": rows, "failed": sum(not row["ok"] for row in rows)}
    copy = copy_bandwidth(device, sizes)
    report["copy_gigabytes"] = copy
    note(f"a copy moves {copy:.0f} GB/s; measuring with the tiles of now")
    report["tiles"] = configs.to_json(launch.tiles(device))
    report["speed"] = list(speed(device, sizes, copy))
    note("trying other tiles")
    tuned, tried = tune(device, sizes)
    report["tried"] = tried
    report["tuned"] = {
        key: report["device"][key] for key in ("name", "target", "torch", "triton")
    } | {"tiles": configs.to_json(tuned)}
    with launch.using(tuned):
        rows = list(correctness(device, sizes.forms))
        report["correctness_tuned"] = {"rows": rows, "failed": sum(not row["ok"] for row in rows)}
        report["speed_tuned"] = list(speed(device, sizes, copy))
    return report


def facts(device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    import triton  # pyright: ignore[reportMissingImports]

    found: dict[str, Any] = {
        "zaya_convert": __version__, "torch": torch.__version__, "triton": triton.__version__,
        "platform": platform.platform(), "python": platform.python_version(),
    }  # fmt: skip
    if device.type == "cpu":
        return {"name": "interpreter", "target": "interpreter", **found}
    name, backend, arch = launch.target(device)
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": name, "target": f"sm{arch}" if backend == "cuda" else arch,
        "memory_bytes": properties.total_memory, "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda, "hip": torch.version.hip, **found,
    }  # fmt: skip


def correctness(device: torch.device, forms: Sequence[QuantSpec]) -> Iterator[dict[str, Any]]:
    """Both ops in some forms against fp32 on the same codes, on sizes that fit no tile."""
    columns, rows, experts = 197, 77, 4
    for spec, dtype in itertools.product(forms, LIMITS):
        bank = [
            Expert(*(stored(*shape, spec) for shape in ((rows, columns),) * 2 + ((columns, rows),)))
            for _ in range(experts)
        ]
        matrix, packed = bank[0].gate, pack_experts(bank, device)
        assert isinstance(matrix, QuantTensor)
        for count in (1, 5, 43):
            x = torch.randn(count, columns).to(dtype)
            found = launch.linear(x.to(device), _moved(matrix, device))
            wanted = reference.linear(x.float(), matrix)
            yield _row("linear", spec, dtype, count, found, wanted)
            ids = torch.randint(-1, experts, (count,))
            shares = torch.rand(count).to(dtype)
            found = launch.moe_ffn(x.to(device), ids.to(device), shares.to(device), packed)
            wanted = reference.moe_ffn(x.float(), ids, shares.float(), bank.__getitem__)
            row = _row("moe_ffn", spec, dtype, count, found, wanted)
            yield row | {"ok": row["ok"] and not found.cpu()[ids < 0].any()}


def _row(
    op: str, spec: QuantSpec, dtype: torch.dtype, count: int, found: Tensor, wanted: Tensor
) -> dict[str, Any]:
    norm = float(wanted.norm())
    error = float((found.cpu().float() - wanted).norm()) / (norm or 1.0)
    return {
        "op": op, "spec": spec.label, "dtype": str(dtype).removeprefix("torch."), "tokens": count,
        "error": error, "limit": LIMITS[dtype], "ok": error <= LIMITS[dtype],
    }  # fmt: skip


def copy_bandwidth(device: torch.device, sizes: Sizes) -> float:
    """GB/s read and written by a copy: what bandwidths are compared with."""
    source = torch.ones(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / timed(lambda: target.copy_(source), device, sizes.seconds) / 1e9


def speed(device: torch.device, sizes: Sizes, copy: float) -> Iterator[dict[str, Any]]:
    """Decode of experts in turn, the head, and prefill, with the tiles in use."""
    for spec in sizes.specs:
        bank = random_bank(sizes.experts, sizes.width, spec, device)
        for tokens in sizes.decode:
            calls = decode_calls(bank, tokens, device)
            moved = tokens * bytes_of(bank) / sizes.experts
            for graph in (True, False) if device.type == "cuda" else (False,):
                taken = timed_all(calls, device, sizes.seconds, graph)
                yield _speed("expert FFN", spec, tokens, taken, moved, copy, graph)
        del bank
        head = random_matrix(1, sizes.head_rows, sizes.width, spec, device).select(0)
        for tokens in sizes.decode:
            x, out = _inputs(tokens, sizes.width, device), _inputs(tokens, head.rows, device)
            taken = timed(partial(launch.linear_into, out, x, head), device, sizes.seconds)
            yield _speed("head", spec, tokens, taken, _bytes(head), copy, False)
        del head
        bank = random_bank(sizes.prefill_experts, sizes.width, spec, device)
        for tokens in sizes.prefill:
            taken = timed(prefill_call(bank, tokens, device), device, sizes.seconds)
            row = _speed("expert FFN", spec, tokens, taken, bytes_of(bank), copy, False)
            yield row | {"teraflops": 6 * tokens * sizes.width**2 / taken / 1e12}


def _speed(
    what: str, spec: QuantSpec, tokens: int, taken: float, moved: float, copy: float, graph: bool
) -> dict[str, Any]:
    return {
        "what": what, "spec": spec.label, "tokens": tokens, "graph": graph, "seconds": taken,
        "gigabytes": moved / taken / 1e9, "share_of_copy": moved / taken / 1e9 / copy,
    }  # fmt: skip


def tune(device: torch.device, sizes: Sizes) -> tuple[configs.Tiles, list[dict[str, Any]]]:
    """(the fastest tiles, every one that was tried); those in use are among them."""
    now = launch.tiles(device)
    graph = device.type == "cuda"
    banks = [random_bank(sizes.experts, sizes.width, spec, device) for spec in sizes.specs]
    costs = [
        partial(timed_all, decode_calls(bank, 1, device), device, sizes.seconds, graph)
        for bank in banks
    ]
    decode, tried = _fastest(now, "decode", sizes.decode_tiles, costs)
    del banks, costs
    banks = [random_bank(sizes.prefill_experts, sizes.width, spec, device) for spec in sizes.specs]
    chosen: list[configs.Prefill] = []
    for kind, each in zip(("few", "many"), sizes.tuning_tokens, strict=True):
        tokens = each * sizes.prefill_experts
        costs = [
            partial(timed, prefill_call(bank, tokens, device), device, sizes.seconds)
            for bank in banks
        ]
        tile, rows = _fastest(now, kind, sizes.prefill_tiles, costs)
        chosen.append(tile)
        tried += rows
    return configs.Tiles(decode, *chosen), tried


def _fastest(
    now: configs.Tiles, kind: str, candidates: Sequence[Any], costs: Sequence[Callable[[], float]]
) -> tuple[Any, list[dict[str, Any]]]:
    """(the tile with the least time over all grids, relative to that in use; all that were tried).

    What does not launch, spills registers, or is clearly slower on one grid is dropped.
    """
    own = getattr(now, kind)
    tried: list[dict[str, Any]] = []
    best, least, baseline = own, 1.0, list[float]()
    for tile in (own, *(tile for tile in candidates if tile != own)):
        row: dict[str, Any] = {"kind": kind, "tile": asdict(tile)}
        tried.append(row)
        taken: list[float] = []
        try:
            with launch.using(replace(now, **{kind: tile})):
                for cost in costs:
                    taken.append(cost())
                    if baseline and taken[-1] > _TOO_SLOW * baseline[len(taken) - 1]:
                        break
        except Exception as error:
            # Triton's compiler fails in many ways: too much shared memory, shapes it refuses.
            if tile == own:
                raise
            row["refused"] = f"{type(error).__name__}: {error}"[:200]
            continue
        row["seconds"] = taken
        kernel = launch.compiled["decode" if kind == "decode" else "prefill"]
        row["spills"] = getattr(kernel, "n_spills", None) or 0
        baseline = baseline or taken
        if len(taken) == len(costs):
            ratios = (mine / first for mine, first in zip(taken, baseline, strict=True))
            row["ratio"] = statistics.geometric_mean(ratios)
            if row["ratio"] < least and not row["spills"]:
                best, least = tile, row["ratio"]
    return best, tried


def stored(rows: int, columns: int, spec: QuantSpec) -> QuantTensor:
    """A matrix of random codes, on the CPU."""
    dtype = torch.int8 if spec.symmetric else torch.uint8
    codes = torch.randint(spec.qmin, spec.qmax + 1, (rows, columns)).to(dtype)
    groups = spec.groups(columns)
    scales = ((torch.rand(rows, groups) + 0.5) / (spec.qmax * columns**0.5)).half()
    middle = 1 << (spec.bits - 1)
    zeros = None if spec.symmetric else torch.randint(middle - 1, middle + 2, (rows, groups))
    return QuantTensor(codes, scales, None if zeros is None else zeros.to(torch.uint8), spec)


def random_matrix(
    count: int, rows: int, columns: int, spec: QuantSpec, device: torch.device
) -> Packed:
    """Packed matrices of random bits, made where they are."""
    one = pack(stored(1, columns, spec))
    words = torch.randint(
        -(2**31), 2**31 - 1, (count, rows, one.words.shape[1]), dtype=torch.int32, device=device
    )
    groups = one.scales.shape[1]
    scales = (torch.rand(count, rows, groups, device=device) * 0.01).half()
    zeros = None
    if not spec.symmetric:
        zeros = torch.randint(0, spec.qmax, (count, rows, groups), dtype=torch.uint8, device=device)
    return Packed(words, scales, zeros, spec, columns)


def random_bank(count: int, width: int, spec: QuantSpec, device: torch.device) -> PackedExperts:
    """Experts of random bits."""
    return PackedExperts(
        random_matrix(count, 2 * width, width, spec, device),
        random_matrix(count, width, width, spec, device),
    )


def bytes_of(bank: PackedExperts) -> int:
    """Size of all experts."""
    return _bytes(bank.gate_up) + _bytes(bank.down)


def _bytes(packed: Packed) -> int:
    parts = (packed.words, packed.scales, packed.zeros)
    return sum(part.nbytes for part in parts if part is not None)


def decode_calls(bank: PackedExperts, tokens: int, device: torch.device) -> list[Call]:
    """A call for each of many choices of different experts, which together are all of them."""
    width = bank.down.rows
    x, out = _inputs(tokens, width, device), _inputs(tokens, width, device)
    shares = torch.rand(tokens, device=device).to(x.dtype)
    order = torch.randperm(bank.count, device=device)
    chosen = [order.roll(-tokens * turn)[:tokens].contiguous()
              for turn in range(max(1, bank.count // tokens))]  # fmt: skip
    chosen = [F.pad(ids, (0, tokens - len(ids)), value=int(ids[0])) for ids in chosen]
    return [lambda ids=ids: launch.moe_ffn_into(out, x, ids, shares, bank) for ids in chosen]


def prefill_call(bank: PackedExperts, tokens: int, device: torch.device) -> Call:
    """A prompt whose tokens go to random experts."""
    x = _inputs(tokens, bank.down.rows, device)
    ids = torch.randint(bank.count, (tokens,), device=device)
    shares, out = torch.rand(tokens, device=device).to(x.dtype), torch.zeros_like(x)
    return lambda: launch.moe_ffn_into(out, x, ids, shares, bank)


def timed_all(calls: Sequence[Call], device: torch.device, spend: float, graph: bool) -> float:
    """Seconds of one of the calls, made in turn; as one graph, or as they are."""

    def run() -> None:
        for call in calls:
            call()

    if not graph:
        return timed(run, device, spend) / len(calls)
    run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return timed(captured.replay, device, spend) / len(calls)


def timed(call: Call, device: torch.device, spend: float) -> float:
    """Seconds of a call: the median of as many as ``spend`` seconds hold."""
    call()
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    once()
    estimate = once()
    return statistics.median(once() for _ in range(max(5, int(spend / max(estimate, 1e-6)))))


def _inputs(tokens: int, width: int, device: torch.device) -> Tensor:
    return torch.randn(tokens, width, device=device).bfloat16()


def _moved(matrix: QuantTensor, device: torch.device) -> QuantTensor:
    zeros = None if matrix.zeros is None else matrix.zeros.to(device)
    return replace(
        matrix, codes=matrix.codes.to(device), scales=matrix.scales.to(device), zeros=zeros
    )


def to_text(report: dict[str, Any]) -> str:
    """The main figures, before and after tuning."""
    lines = [report["device"]["name"]]
    for part, tiles in (("correctness", "in use"), ("correctness_tuned", "tuned")):
        rows = report[part]["rows"]
        wrong = [row for row in rows if not row["ok"]]
        lines.append(f"{len(rows) - len(wrong)} of {len(rows)} forms are right, tiles {tiles}")
        lines += [
            f"WRONG: {row['op']} {row['spec']} {row['dtype']}, {row['tokens']} tokens: error "
            f"{row['error']:.1e}, limit {row['limit']:.0e}"
            for row in wrong
        ]
    lines.append(f"a copy moves {report['copy_gigabytes']:.0f} GB/s")
    for before, after in zip(report["speed"], report["speed_tuned"], strict=True):
        graph = " in a graph" if before["graph"] else ""
        flops = f", {after['teraflops']:.1f} TFLOP/s" if "teraflops" in after else ""
        lines.append(
            f"{before['what']}, {before['tokens']} tokens, {before['spec']}{graph}: "
            f"{before['seconds'] * 1e6:.1f} -> {after['seconds'] * 1e6:.1f} µs, "
            f"{after['share_of_copy']:.0%} of the copy{flops}"
        )
    tiles = report["tuned"]["tiles"]
    return "\n".join([*lines, *(f"tuned {kind}: {tile}" for kind, tile in tiles.items())])

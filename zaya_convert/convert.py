"""``execute(plan)``: the only loop that reads weights and writes them.

Each tensor is read once, quantized, encoded and written to its planned place, several at a time.
Memory is a few tensors, whatever the model's size. Every finished step is journalled, so an
interrupted run continues; the final name appears only when everything is there.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zaya_convert import __version__, card, manifest
from zaya_convert.checkpoint import SourceDigest, TensorInfo, torch_dtype
from zaya_convert.errors import InputError, UsageError
from zaya_convert.export import Packing, packing
from zaya_convert.export.safetensors import ShardSet
from zaya_convert.layout import TensorKey
from zaya_convert.plan import Plan, Step
from zaya_convert.publish import Journal, Workspace, io_errors, workspace
from zaya_quant.methods import METHODS
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

Progress = Callable[[int], None]

_JOURNAL_SECONDS = 2.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_KEPT_BYTES = 256 << 20
# Steps submitted ahead: enough to keep the workers busy while the journal waits for the disk. Only
# running steps hold memory.
_IN_FLIGHT = 512
_FP16_NORMAL = 2.0**-14


@dataclass(frozen=True)
class Result:
    """What a conversion wrote. ``widened`` lists matrices whose scales had to be bf16."""

    output: Path
    bytes: int
    bits_per_weight: float
    seconds: float
    source_digest: str
    widened: tuple[str, ...]
    resumed_steps: int


def execute(
    plan: Plan,
    out: Path,
    *,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> Result:
    """Carry out a plan.

    Args:
        out: output folder; appears complete or not at all.
        threads: tensors in work at once (default: one per core). Never changes the bytes.
        resume: continue an interrupted run of the same plan.
        overwrite: replace an existing output, once the new one is complete.
        progress: called with the number of source bytes just finished.

    Raises:
        InputError: weights that are not finite or cannot be represented, all of them listed; a
            source that changed meanwhile.
        OutputExistsError, OutputError, UsageError: see ``publish``.
    """
    _check_apart(plan, out)
    threads = threads or os.cpu_count() or 1
    started = time.monotonic()
    stamp = plan.source.stamp()
    plan.source.check_tied_copy()
    room = plan.bytes + (16 << 20)
    with (
        workspace(
            out,
            plan.fingerprint(),
            room,
            marker=manifest.NAME,
            resume=resume,
            overwrite=overwrite,
        ) as place,
        io_errors(out),
    ):
        records = _run_steps(plan, place, threads, progress)
        if plan.source.stamp() != stamp:
            place.discard()
            raise InputError("changed while it was read", plan.source.path.name)
        digest = _source_digest(plan, records)
        widened = tuple(key for key, record in records.items() if record["widened"])
        _finish(plan, place, records, digest, widened, threads)
        size = sum(path.stat().st_size for path in place.partial.glob("*.safetensors"))
        place.publish()
    return Result(
        out, size, plan.bits_per_weight, time.monotonic() - started, digest, widened,
        len(place.done),
    )  # fmt: skip


def _check_apart(plan: Plan, out: Path) -> None:
    """Refuse an output that is, holds or replaces a part of the input."""
    target = out.resolve()
    for path in (plan.source.path, *plan.source.files):
        if path.resolve().is_relative_to(target):
            raise UsageError(f"{out} is, or holds, the input; it is never written to")
    if target.is_relative_to(plan.source.path.resolve()) and target.is_file():
        raise UsageError(f"{out} is part of the input; it is never written to")


def _run_steps(
    plan: Plan, place: Workspace, threads: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Run what the journal does not vouch for; returns the records of all steps by name."""
    target = packing(plan.packing)
    shards = ShardSet(place.partial, plan.arrays, plan.shard_bytes)
    journal = Journal(place, shards.descriptors)
    records: dict[str, dict[str, Any]] = {}
    todo: list[Step] = []
    for step in plan.steps:
        record = place.done.get(str(step.key))
        if record and record["written"] == _digests(shards, step):
            records[str(step.key)] = record
            progress(plan.source.infos[step.key].bytes)
        else:
            todo.append(step)
    problems: dict[TensorKey, list[str]] = {}

    # Pages of a source that memory cannot hold would only push out those of the output, which is
    # read once more at the end.
    large = plan.source.bytes > _physical_memory() // 2

    def work(step: Step) -> dict[str, Any]:
        record = _run_step(plan, target, shards, step)
        if large:
            plan.source.forget(step.key)
        return record

    flushed = time.monotonic()
    try:
        _keep_freed_memory()
        with _single_threaded_torch(), ThreadPoolExecutor(threads) as pool:
            for step, future in _bounded(pool, work, todo, _IN_FLIGHT):
                try:
                    record = future.result()
                except InputError as error:
                    problems[step.key] = error.problems
                    continue
                records[record["step"]] = record
                journal.add(record)
                progress(plan.source.infos[step.key].bytes)
                if time.monotonic() - flushed > _JOURNAL_SECONDS:
                    journal.flush()
                    flushed = time.monotonic()
    finally:
        journal.flush()
        journal.close()
        shards.close()
    if problems:
        place.discard()
        lines = [line for key in plan.source.infos for line in problems.get(key, ())]
        raise InputError(lines, plan.source.path.name)
    return {str(step.key): records[str(step.key)] for step in plan.steps}


def _bounded(
    pool: ThreadPoolExecutor, work: Callable[[Step], Any], steps: list[Step], limit: int
) -> Iterator[tuple[Step, Future[Any]]]:
    """Yield finished steps while never having more than ``limit`` in flight."""
    running: dict[Future[Any], Step] = {}
    queue = iter(steps)
    try:
        while True:
            while len(running) < limit and (step := next(queue, None)) is not None:
                running[pool.submit(work, step)] = step
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future
    finally:
        for future in running:
            future.cancel()


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Parallelism is over tensors; torch's own threads would only fight with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Tell glibc to reuse the buffers of one tensor for the next instead of giving them back.

    Otherwise every buffer is mapped and zeroed anew, page by page, which took a third of the time.
    """
    with suppress(AttributeError, OSError):  # another C library: only slower
        libc = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, _KEPT_BYTES)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _run_step(plan: Plan, target: Packing, shards: ShardSet, step: Step) -> dict[str, Any]:
    info = plan.source.infos[step.key]
    record: dict[str, Any] = {"step": str(step.key), "widened": False, "source": ""}
    if step.copy:
        (region,) = step.regions.values()
        digest, offset = hashlib.sha256(), 0
        for chunk in plan.source.chunks(step.key):
            _check_finite(torch.frombuffer(chunk, dtype=torch_dtype(info.dtype)), info, offset)
            digest.update(chunk)
            shards.write(region, chunk, offset)
            offset += len(chunk)
        return record | {"source": digest.hexdigest(), "written": [digest.hexdigest()]}
    value = plan.source.read(step.key)
    if isinstance(value, torch.Tensor):
        record["source"] = hashlib.sha256(_view(value)).hexdigest()
        if step.spec is None:
            _check_finite(value.flatten(), info, 0)
        else:
            value = _quantize(value, step.spec, step.method, info)
            record["widened"] = value.spec != step.spec
            if record["widened"] and (found := target.problems(info, value.spec)):
                raise InputError([f"{_where(info)} needs wider scales: {p}" for p in found])
    else:
        _check_finite(value.scales.flatten(), info, 0)
    components = {name: _view(tensor) for name, tensor in target.encode(value).items()}
    for name, data in components.items():
        shards.write(step.regions[name], data)
    return record | {"written": [hashlib.sha256(components[n]).hexdigest() for n in step.regions]}


def _quantize(weight: torch.Tensor, spec: QuantSpec, method: str, info: TensorInfo) -> QuantTensor:
    """Quantize one matrix, with bf16 scales where fp16 would overflow or lose them."""
    run = importlib.import_module(METHODS[method]).quantize
    try:
        result = run(weight, spec, None)
    except ValueError:
        _check_finite(weight.flatten(), info, 0)
        result = None
    if spec.scale_dtype == "float16" and (result is None or _too_small(result)):
        spec, result = replace(spec, scale_dtype="bfloat16"), None
    try:
        return result or run(weight, spec, None)
    except ValueError as error:
        raise InputError(f"{_where(info)}: {error}") from None


def _too_small(value: QuantTensor) -> bool:
    """Whether some row has only scales below fp16's normal range, and so few bits in them.

    A subnormal scale beside normal ones of its row does no harm: its absolute error is far below
    the rounding error of those.
    """
    largest = value.scales.abs().amax(dim=1)
    return bool(((largest > 0) & (largest < _FP16_NORMAL)).any())


def _check_finite(values: torch.Tensor, info: TensorInfo, offset: int) -> None:
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    first = int((~finite).nonzero()[0, 0])
    flat = offset // values.element_size() + first
    raise InputError(f"{_where(info)}: value {flat} is {values[first].item()}, not a finite number")


def _where(info: TensorInfo) -> str:
    piece = next(iter(info.pieces.values()))
    return f"{piece.file.name}: {str(info.key)!r}"


def _view(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digests(shards: ShardSet, step: Step) -> list[str]:
    """sha256 of each region of a step, as it stands on disk."""
    found = []
    for region in step.regions.values():
        digest = hashlib.sha256()
        for piece in shards.read(region):
            digest.update(piece)
        found.append(digest.hexdigest())
    return found


def _source_digest(plan: Plan, records: dict[str, dict[str, Any]]) -> str:
    """Of the float model; an artifact passes on the digest of what it was made from."""
    inherited = plan.source.manifest.get("source", {}).get("digest")
    if inherited or any(info.spec for info in plan.source.infos.values()):
        return inherited or ""
    digest = SourceDigest()
    for key, info in plan.source.infos.items():
        digest.add(info, records[str(key)]["source"])
    return digest.hexdigest(plan.source.infos)


def _finish(
    plan: Plan,
    place: Workspace,
    records: dict[str, dict[str, Any]],
    digest: str,
    widened: tuple[str, ...],
    threads: int,
) -> None:
    """Headers, side files and the manifest."""
    shards = ShardSet(place.partial, plan.arrays, plan.shard_bytes)
    dtypes = {
        region.array.name: "BF16"
        for step in plan.steps
        if records[str(step.key)]["widened"]
        for region in step.regions.values()
        if region.array.dtype == "F16"
    }
    extra = shards.finish(dtypes)
    shards.close()
    facts = {
        "tool": {"name": "zaya-convert", "version": __version__},
        "packing": plan.packing,
        "recipe": plan.recipe.to_dict() if plan.recipe else plan.source.manifest.get("recipe"),
        "calibration": None,
        "source": {"digest": digest, "model": plan.origin},
        "skip_mode": "zero",
        "weights": plan.weights,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "bf16_scales": list(widened),
    }
    config = card.json_bytes(packing(plan.packing).config(plan))
    files = plan.source.side_files() | extra | {"config.json": config}
    files["README.md"] = card.model_card(plan, facts)
    for name, data in files.items():
        (place.partial / name).write_bytes(data)
    known = {
        region.array.name: digest
        for step in plan.steps
        for region, digest in zip(
            step.regions.values(), records[str(step.key)]["written"], strict=True
        )
        if region.bytes == region.array.bytes
    }
    paths = [place.partial / name for name in (*shards.names, *files)]
    with ThreadPoolExecutor(threads) as pool:
        digests = list(pool.map(lambda path: manifest.digest_file(path, known), paths))
    (place.partial / manifest.NAME).write_bytes(manifest.build(facts, digests))

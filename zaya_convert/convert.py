"""``execute(plan)``: the only loop that reads weights and writes them.

Each tensor is read once, quantized, encoded and written to its planned place, several at a time.
Memory is a few tensors, whatever the model's size. Every finished step is journalled, so an
interrupted run continues; the final name appears only when everything is there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zaya_convert import __version__, card, equalize, manifest, publish
from zaya_convert.checkpoint import SourceDigest
from zaya_convert.errors import InputError, UsageError
from zaya_convert.export import packing
from zaya_convert.export.container import Container, Outcome, PlannedFiles, split
from zaya_convert.layout import TensorKey
from zaya_convert.plan import Plan, Step
from zaya_convert.prefix import Prefix, on_prefix
from zaya_convert.publish import Journal, Workspace, io_errors, workspace
from zaya_convert.runtime.walk import Walk
from zaya_convert.threads import Threads, one_thread_each
from zaya_convert.work import Record, Worker
from zaya_quant.methods import METHODS

Progress = Callable[[int], None]

_JOURNAL_SECONDS = 2.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_KEPT_BYTES = 256 << 20
_WALK, _STREAMS = "walk", "streams"  # folders of a run in progress


@dataclass(frozen=True)
class Result:
    """What a conversion wrote.

    ``widened`` lists matrices whose scales had to be bf16, ``narrow`` those whose scales should be
    but lie below fp16's normal range, because the packing holds no others.
    """

    output: Path
    bytes: int
    bits_per_weight: float
    seconds: float
    source_digest: str
    widened: tuple[str, ...]
    narrow: tuple[str, ...]
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
        out: output folder, or a single file when its name ends in ``.gguf``; appears complete or
            not at all.
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
    if plan.needs_stats:
        if plan.stats is None:
            raise UsageError("this recipe needs calibration: calibrate first, or use method rtn")
        plan.stats.check_fits(plan.source)
    threads = threads or os.cpu_count() or 1
    started = time.monotonic()
    stamp = plan.source.stamp()
    plan.source.check_tied_copy()
    with (
        workspace(
            out,
            plan.fingerprint(),
            _room(plan),
            marker=_marker(out),
            resume=resume,
            overwrite=overwrite,
        ) as place,
        io_errors(out),
    ):
        container = packing(plan.packing).container(plan, place.partial)
        with closing(container.files) as files:
            records = _run_steps(plan, place, files, threads, progress)
            if plan.source.stamp() != stamp:
                place.discard()
                raise InputError("changed while it was read", plan.source.path.name)
            digest = _source_digest(plan, records)
            _finish(plan, place, container, records, digest, threads)
        place.publish(files.names[0] if is_file(out) else None)
    widened, narrow = (
        tuple(key for key, record in records.items() if record.get(kind))
        for kind in ("widened", "narrow")
    )
    return Result(
        out, files.bytes, plan.bits_per_weight, time.monotonic() - started, digest, widened, narrow,
        len(place.done),
    )  # fmt: skip


def check_ready(plan: Plan, out: Path, overwrite: bool) -> None:
    """Refuse what ``execute`` would refuse at once, before calibration that takes long.

    Raises:
        OutputExistsError, OutputError, UsageError: see ``publish``.
    """
    _check_apart(plan, out)
    publish.check_ready(out, _room(plan), marker=_marker(out), overwrite=overwrite)


def is_file(out: Path) -> bool:
    """Whether an output is a single file, and no folder."""
    return out.suffix == ".gguf"


def _marker(out: Path) -> str:
    return "" if is_file(out) else manifest.NAME


def _room(plan: Plan) -> int:
    """Bytes that an output takes, side files included."""
    return plan.bytes + (16 << 20)


def _check_apart(plan: Plan, out: Path) -> None:
    """Refuse an output that is, holds or replaces a part of the input.

    Raises:
        UsageError: also for a single file of a format that has none, or of a plan for several.
    """
    if is_file(out) and not plan.packing.startswith("gguf"):
        raise UsageError(f"{out} is a name for GGUF; {plan.packing} writes a folder")
    if is_file(out) and len(split(plan.arrays, plan.shard_bytes)) > 1:
        raise UsageError(f"{out}: splitting makes several files; name a folder instead")
    target = out.resolve()
    for path in (plan.source.path, *plan.source.files):
        if path.resolve().is_relative_to(target):
            raise UsageError(f"{out} is, or holds, the input; it is never written to")
    if target.is_relative_to(plan.source.path.resolve()) and target.is_file():
        raise UsageError(f"{out} is part of the input; it is never written to")


def _run_steps(
    plan: Plan, place: Workspace, files: PlannedFiles, threads: int, progress: Progress
) -> dict[str, Record]:
    """Run what the journal does not vouch for; returns the records of all steps by name."""
    run = _Run(plan, place, Worker(plan, files), Journal(place, files.descriptors), progress)
    try:
        _keep_freed_memory()
        run.resume(files)
        with one_thread_each():
            run.alone(threads)
        run.in_order(threads)
        # Here, because an interrupted run may have left them when all steps were finished.
        for folder in (_WALK, f"{_WALK}.new", _STREAMS):
            shutil.rmtree(place.partial / folder, ignore_errors=True)
    except (InputError, UsageError):
        place.discard()
        raise
    finally:
        run.journal.flush()
        run.journal.close()
    return {str(step.key): run.records[str(step.key)] for step in plan.steps}


@dataclass
class _Run:
    """The steps of one conversion, being carried out."""

    plan: Plan
    place: Workspace
    worker: Worker
    journal: Journal
    progress: Progress
    records: dict[str, Record] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    _counted: set[str] = field(default_factory=set)

    def resume(self, files: PlannedFiles) -> None:
        """Take over what an interrupted run finished, if it still stands on disk."""
        for step in self.plan.steps:
            record = self.place.done.get(str(step.key))
            if record and record["written"] == _digests(files, step):
                self.records[str(step.key)] = record

    def alone(self, threads: int) -> None:
        """Every step that needs nothing but its tensor; the others are read and checked.

        Raises:
            InputError: all tensors with faults, in order.
        """
        source = self.plan.source
        # Pages of a source that memory cannot hold would only push out those of the output, which
        # is read once more at the end.
        large = source.bytes > _physical_memory() // 2

        def work(step: Step) -> Record | str | InputError:
            try:
                result = self.worker.check(step) if on_prefix(step) else self.worker.run(step)
            except InputError as error:
                return error
            if large:
                source.forget(step.key)
            return result

        todo = []
        for step in self.plan.steps:
            if str(step.key) in self.records:
                self.digests[str(step.key)] = self.records[str(step.key)]["source"]
                self._count(step)
            else:
                todo.append(step)
        problems: dict[TensorKey, list[str]] = {}
        flushed = time.monotonic()
        with Threads(threads) as pool:
            for step, result in pool.each(work, todo):
                if isinstance(result, InputError):
                    problems[step.key] = result.problems
                    continue
                if isinstance(result, str):
                    self.digests[str(step.key)] = result
                    continue
                self._finished(result)
                self._count(step)
                if time.monotonic() - flushed > _JOURNAL_SECONDS:
                    self.journal.flush()
                    flushed = time.monotonic()
        if problems:
            lines = [line for key in source.infos for line in problems.get(key, ())]
            raise InputError(lines, source.path.name)

    def in_order(self, threads: int) -> None:
        """Steps that are quantized on the quantized prefix, layer by layer."""
        steps = [step for step in self.plan.steps if on_prefix(step)]
        if all(str(step.key) in self.records for step in steps):
            return
        stats = self.plan.stats
        assert stats is not None
        drift = any(METHODS[step.method].needs == "drift" for step in steps)
        state = self.place.partial / _WALK
        by_name = {str(step.key): step for step in steps}
        lock = threading.Lock()

        def finish(record: Record) -> None:
            with lock:
                self._finished(record)
                self._count(by_name[record["step"]])

        prefix = Prefix(self.plan, self.worker, finish, self.digests)
        walk = Walk(
            self.plan.source, stats.sequences, reference=drift, threads=threads,
            folder=self.place.partial / _STREAMS, max_memory=self.plan.max_memory,
        )  # fmt: skip

        def vouched_for(layer: int) -> bool:
            """Whether the journal holds all that a state in front of ``layer`` builds on."""
            before = (step for step in steps if step.key.layer < layer)
            return all(str(step.key) in self.records for step in before)

        walk.restore(state, vouched_for)
        while walk.layer < self.plan.source.config.layers:
            walk.step(prefix)
            self.journal.flush()
            walk.save(state)

    def _finished(self, record: Record) -> None:
        self.records[record["step"]] = record
        self.journal.add(record)

    def _count(self, step: Step) -> None:
        if str(step.key) not in self._counted:
            self._counted.add(str(step.key))
            self.progress(self.plan.source.infos[step.key].bytes)


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


def _digests(files: PlannedFiles, step: Step) -> list[str]:
    """sha256 of each region of a step, as it stands on disk."""
    found = []
    for region in step.regions.values():
        digest = hashlib.sha256()
        for piece in files.read(region):
            digest.update(piece)
        found.append(digest.hexdigest())
    return found


def _source_digest(plan: Plan, records: dict[str, Record]) -> str:
    """Of the float model; an artifact passes on the digest of what it was made from."""
    if plan.source_digest is not None:
        return plan.source_digest
    digest = SourceDigest()
    for key, info in plan.source.infos.items():
        digest.add(info, records[str(key)]["source"])
    return digest.hexdigest(plan.source.infos)


def _calibration(plan: Plan, records: dict[str, Record]) -> dict[str, Any] | None:
    """What the manifest says of the calibration, or hands on from the artifact it came from."""
    stats = plan.stats
    if stats is None or not plan.needs_stats:
        return plan.source.manifest.get("calibration")
    return {
        "digest": stats.digest,
        "data": stats.facts["description"],
        "tokens": stats.tokens,
        "tokens_digest": stats.facts["tokens_digest"],
        "min_tokens": stats.min_tokens,
        "skip_rate": round(stats.skip_rate, 6),
        "counts": stats.counts.tolist(),
        "below_minimum": [list(entry) for entry in stats.below()],
        "fallback": {name: r["fallback"] for name, r in records.items() if r.get("fallback")},
    }


def _finish(
    plan: Plan,
    place: Workspace,
    container: Container,
    records: dict[str, Record],
    digest: str,
    threads: int,
) -> None:
    """Headers and, in a folder, side files and the manifest."""
    widened = [key for key, record in records.items() if record["widened"]]
    dtypes = {
        region.array.name: "BF16"
        for step in plan.steps
        if records[str(step.key)]["widened"]
        for region in step.regions.values()
        if region.array.dtype == "F16"
    }
    checksums = tuple(d for step in plan.steps for d in records[str(step.key)]["written"])
    extra = container.finish(Outcome(digest, dtypes, checksums, tuple(widened)))
    if not is_file(place.out):
        extra |= packing(plan.packing).files(plan)
        _describe(plan, place, records, digest, extra, widened, container.files.names, threads)


def _describe(
    plan: Plan,
    place: Workspace,
    records: dict[str, Record],
    digest: str,
    extra: dict[str, bytes],
    widened: list[str],
    names: list[str],
    threads: int,
) -> None:
    """Side files, model card and manifest."""
    facts = {
        "tool": {"name": "zaya-convert", "version": __version__},
        "packing": plan.packing,
        "recipe": plan.how,
        "calibration": _calibration(plan, records),
        "equalized": bool(plan.source.scaling) or bool(plan.source.manifest.get("equalized")),
        "allocation": plan.allocation or plan.source.manifest.get("allocation"),
        "source": {"digest": digest, "model": plan.origin},
        "skip_mode": "zero",
        "weights": plan.weights,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "bf16_scales": widened,
    }
    files = plan.source.side_files() | extra
    if plan.source.scaling:
        files[equalize.NAME] = equalize.serialise(plan.source.scaling)
    files["README.md"] = card.model_card(plan, facts)
    for name, data in files.items():
        (place.partial / name).parent.mkdir(exist_ok=True)
        (place.partial / name).write_bytes(data)
    known = {
        region.array.name: digest
        for step in plan.steps
        for region, digest in zip(
            step.regions.values(), records[str(step.key)]["written"], strict=True
        )
        if region.bytes == region.array.bytes
    }

    def digest_of(name: str) -> manifest.FileDigest:
        return replace(manifest.digest_file(place.partial / name, known), name=name)

    with Threads(threads) as pool:
        digests = list(pool.map(digest_of, (*names, *files)))
    (place.partial / manifest.NAME).write_bytes(manifest.build(facts, digests))

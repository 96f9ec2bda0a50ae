"""Other quantizers on one checkpoint, judged as ``quality.py`` judges ours. Each is optional.

    python benchmarks/peers.py MODEL --data CALIB --valid VALID \\
        --llmcompressor LLMC/bin/python --auto-round AR/bin/python --llama-cpp DIR

MODEL is a folder in hybrid layout (tools/relayout.py makes one). Every peer calibrates on the same
32,768 tokens: documents joined, 64 rows of 512, each beginning with <bos>. What it wrote is opened
by our readers (GGUF through ``peers/gguf_dense.py``) and judged in our runtime in float32.

Each peer runs in an environment of its own:

    python3 -m venv LLMC && LLMC/bin/pip install \\
        torch==2.13.0 transformers==5.17.0 compressed-tensors==0.19.0 llmcompressor==0.14.0.1
    python3 -m venv AR && AR/bin/pip install \\
        torch==2.13.0 transformers==5.24.0 auto-round==0.16.1

and llama.cpp in a folder where the user built ``llama-quantize`` and ``llama-imatrix`` in
``build/``, from a fork that knows ZAYA, changed in two small ways by the user: its converter's
table of models must name ``ZayaForCausalLM``, and its imatrix tool must take a file of token ids,
one a word, when the environment variable IMATRIX_TOKEN_IDS is set.

What to know of them:

* transformers overwrites the last balancing bias when it loads a model; the workers restore it.
* llm-compressor shows every expert all tokens; "routed" rows show it its own only.
* auto-round needs ``enable_torch_compile=False``, because its compiled backward pass fails on this
  model, and drops the router state between layers; "states" rows register it.
* llama.cpp quantizes the router's MLP and the embedding too, which the others leave in bf16; the
  "router f16" row keeps the router. llama-imatrix gets token ids, because the converter takes
  byte-fallback tokenizers only; for a model with another tokenizer it gets that of zaya1-tiny as a
  placeholder. llama-imatrix crashes with several sequences in a batch. The converter runs in our
  environment, with the extras oracle and dev.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from judge import Cost, Judge, Row, RunError, line, measured, report

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.data import load_documents
from zaya_convert.errors import InputError
from zaya_convert.models import BUNDLED, open_model

HERE = Path(__file__).parent
WORKERS = HERE / "peers"
ROWS, LENGTH = 64, 512
ROUTER_F16 = ("--tensor-type", "zaya_router=f16", "--tensor-type", r"ffn_gate\.weight=f16")


@dataclass
class Peers:
    """One checkpoint, its calibration tokens and the tools at hand."""

    model: Path
    judge: Judge
    folder: Path
    threads: int
    steps: int
    llmcompressor: str | None
    auto_round: str | None
    llama_cpp: Path | None

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Name and job of every row that the given tools allow, in the order of the table."""
        if self.llmcompressor:
            worker = (self.llmcompressor, WORKERS / "llmcompressor_worker.py")
            for method, *more in (("rtn",), ("gptq",), ("gptq", "routed")):
                for group in (128, 32):
                    name = " ".join(["llm-compressor", method, f"g{group}", *more])
                    yield name, self.packed(name, *worker, method, group, *more)
        if self.auto_round:
            worker = (self.auto_round, WORKERS / "auto_round_worker.py")
            for steps, *more in ((0,), (self.steps,), (self.steps, "states")):
                for group in (128, 32):
                    name = " ".join(["auto-round", f"{steps} steps", f"g{group}", *more])
                    yield name, self.packed(name, *worker, group, steps, *more)
        if self.llama_cpp:
            for kind in ("Q8_0", "Q4_0", "Q4_K_M"):
                yield f"llama.cpp {kind}", self.gguf(f"llama.cpp {kind}", kind, False)
            for kind in ("Q4_0", "Q4_K_S", "Q4_K_M"):
                name = f"llama.cpp {kind} imatrix"
                yield name, self.gguf(name, kind, True)
            name = "llama.cpp Q4_K_M imatrix, router f16"
            yield name, self.gguf(name, "Q4_K_M", True, *ROUTER_F16)

    def calibration(self, data: str | None) -> None:
        """Write the tokens, the same for everybody: as JSON lines, and as plain numbers."""
        found = load_documents(
            self.judge.reference, data, length=LENGTH, pack=True, tokens=ROWS * LENGTH
        )
        rows = [ids.tolist() for ids in found.ids if len(ids) == LENGTH][:ROWS]
        if len(rows) < ROWS:
            raise InputError(f"holds fewer than {ROWS * LENGTH:,} tokens", found.description)
        bos = self.judge.reference.config.bos_id
        rows = [row if bos is None else [bos, *row[1:]] for row in rows]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "ids.jsonl").write_text(
            "".join(json.dumps({"ids": row}) + "\n" for row in rows)
        )
        (self.folder / "ids.txt").write_text(
            "\n".join(" ".join(map(str, row)) for row in rows) + "\n"
        )

    def packed(self, name: str, python: str, worker: Path, *words: object) -> Callable[[], Row]:
        """A worker that writes a folder in a packing that we read."""

        def job() -> Row:
            out = self._empty(name)
            ids = self.folder / "ids.jsonl"
            cost = self._run(name, python, worker, self.model, ids, out, *words)
            (config,) = out.rglob("config.json")  # auto-round adds a folder
            return self.judge.row(name, open_model(str(config.parent)), cost)

        return job

    def gguf(self, name: str, kind: str, imatrix: bool, *flags: str) -> Callable[[], Row]:
        """llama-quantize of a bf16 file, made once, with or without an importance matrix."""

        def job() -> Row:
            assert self.llama_cpp is not None
            out, source = self._empty(name), self._bf16()
            file, options, cost = out / "model.gguf", list(flags), Cost()
            if imatrix:
                found, cost = self._imatrix(source)
                options += ["--imatrix", str(found)]
            tool = self.llama_cpp / "build/bin/llama-quantize"
            cost = cost + self._run(name, tool, *options, source, file, kind, self.threads)
            dense = [sys.executable, WORKERS / "gguf_dense.py", file, self.model, out / "dense"]
            size = json.loads(measured(dense)[0])["bytes"]
            return self.judge.row(name, open_model(str(out / "dense")), cost, size)

        return job

    def _bf16(self) -> Path:
        """The model as an unquantized GGUF file."""
        assert self.llama_cpp is not None
        file, legacy = self.folder / "bf16.gguf", self.folder / "legacy"
        if not file.exists():
            shutil.rmtree(legacy, ignore_errors=True)
            tool = HERE.parent / "tools/relayout.py"
            self._run("relayout", sys.executable, tool, self.model, legacy, "--to", "legacy")
            please_converter(legacy)
            tool, flags = self.llama_cpp / "convert_hf_to_gguf.py", ("--outtype", "bf16")
            self._run("convert", sys.executable, tool, legacy, *flags, "--outfile", file)
        return file

    def _imatrix(self, source: Path) -> tuple[Path, Cost]:
        """The importance matrix, made once, and what it took."""
        assert self.llama_cpp is not None
        file, note = self.folder / "imatrix.gguf", self.folder / "imatrix.json"
        if not note.exists():
            unused = self.folder / "unused.txt"
            unused.write_text("unused\n")
            tool = self.llama_cpp / "build/bin/llama-imatrix"
            one = ("-c", LENGTH, "-b", LENGTH, "-ub", LENGTH, "-t", self.threads, "--no-ppl")
            cost = self._run("imatrix", tool, "-m", source, "-f", unused, "-o", file, *one)
            note.write_text(json.dumps([cost.seconds, cost.cpu_seconds, cost.peak_bytes]))
        return file, Cost(*json.loads(note.read_text()))

    def _run(self, name: str, *command: object) -> Cost:
        env = {
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin would slow others on shared cores
            "IMATRIX_TOKEN_IDS": str(self.folder / "ids.txt"),
        }
        return measured(command, env, self.folder / "logs" / f"{name}.log")[1]

    def _empty(self, name: str) -> Path:
        folder = self.folder / "made" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def please_converter(legacy: Path) -> None:
    """Change what convert_hf_to_gguf.py cannot read: a null rope_scaling, and most tokenizers."""
    path = legacy / "config.json"
    config = json.loads(path.read_text())
    if config.get("rope_scaling") is False:
        del config["rope_scaling"]
        path.write_text(json.dumps(config))
    if json.loads((legacy / "tokenizer.json").read_text())["model"].get("byte_fallback"):
        return
    placeholder = json.loads((BUNDLED / "tokenizer.json").read_text())
    vocab = placeholder["model"]["vocab"]
    if len(vocab) > config["vocab_size"]:
        raise RunError("the placeholder tokenizer has more tokens than the model")
    vocab |= {f"unused{i}": i for i in range(len(vocab), config["vocab_size"])}
    (legacy / "tokenizer.json").write_text(json.dumps(placeholder))
    shutil.copy(BUNDLED / "tokenizer_config.json", legacy)


def measure(peers: Peers, only: str) -> list[Row]:
    """Run every row; one that fails does not stop the others."""
    rows: list[Row] = []
    for name, job in peers:
        if not re.search(only, name):
            continue
        try:
            rows.append(job())
        except (RunError, InputError, ValueError) as error:
            rows.append(Row(name, error=str(error)))
        print(line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _hybrid(reference: Checkpoint) -> Checkpoint:
    if reference.format != "hybrid":
        raise InputError("is not in hybrid layout", reference.path.name)
    return reference


def main() -> None:
    """Parse the command line, run, print one table."""
    parser = argparse.ArgumentParser(description="Quality of other quantizers.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", help="calibration text (default: as `calibrate`)")
    parser.add_argument("--valid", help="text to judge on (default: as `validate`)")
    parser.add_argument("--tokens", type=int, default=16384, help="to judge on")
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="interpreter that has it")
    parser.add_argument("--auto-round", metavar="PYTHON", help="interpreter that has it")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="built source tree")
    parser.add_argument("--steps", type=int, default=200, help="of auto-round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="for each peer")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows to run, by name")
    parser.add_argument("--out", type=Path, help="keep what peers write, and their logs, here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    reference = _hybrid(open_model(str(options.model)))
    judge = Judge(reference, options.valid, options.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        peers = Peers(
            options.model.resolve(), judge, (options.out or Path(temporary)).resolve(),
            options.threads, options.steps, options.llmcompressor, options.auto_round,
            options.llama_cpp and options.llama_cpp.resolve(),
        )  # fmt: skip
        peers.calibration(options.data)
        rows = measure(peers, options.only)
    note = f"peers calibrated on {ROWS * LENGTH:,} tokens with {options.threads} threads"
    report(judge, rows, [note], options.json)


if __name__ == "__main__":
    main()

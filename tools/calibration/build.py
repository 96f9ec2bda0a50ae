"""Write `zaya_convert/bundled/calibration/general.jsonl`, the default text for calibration.

    python -m tools.calibration.build                       # what is generated anew, the rest kept
    python -m tools.calibration.build --public-domain DIR   # public-domain works read again
    python -m tools.calibration.build --repository          # code and docs read again

Generated documents come from code alone. The others are frozen: without their flag they are taken
over from the present file, so that a rebuild gives the same bytes on any machine, although neither
the Debian packages nor an older state of this repository is there. Every line says its source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.calibration import everyday, numbers, office, procedures, puzzles, quantities, sources
from tools.calibration.voice import SYSTEM_PROMPTS, Exchange

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "zaya_convert" / "bundled" / "calibration" / "general.jsonl"
SEED = 20

Document = dict[str, Any]

# Part, source, and how many bytes of lines it gives at least.
MIX: tuple[tuple[str, str, int], ...] = (
    ("reasoning", "generated-reasoning", 294_000),
    ("prose", "austen", 72_000),
    ("prose", "jargon-file", 42_000),
    ("prose", "charters", 15_000),
    ("prose", "devils-dictionary", 13_000),
    ("prose", "bible-english", 9_000),
    ("prose", "bible-spanish", 9_000),
    ("code", "repository", 72_000),
    ("code", "sqlite-docs", 56_000),
    ("other", "generated-office", 65_000),
)
PART_OF = {source: part for part, source, _ in MIX}
GENERATED = ("generated-reasoning", "generated-office")
# Two documents that share this much of the shorter one's runs of words are near duplicates.
_RUN, _SHARED = 7, 0.35
_REASONING = (
    numbers.GENERATORS
    + quantities.GENERATORS
    + puzzles.GENERATORS
    + procedures.GENERATORS
    + everyday.GENERATORS
)


def line_of(document: Document) -> str:
    """The document as it stands in the file, with its line break."""
    return json.dumps(document, ensure_ascii=False) + "\n"


def size_of(document: Document) -> int:
    """Bytes of the document's line."""
    return len(line_of(document).encode())


def text_of(document: Document) -> str:
    """The document's words, whichever form it has."""
    if "text" in document:
        return document["text"]
    return "\n".join(message["content"] for message in document["messages"])


def word_runs(text: str) -> set[int]:
    """Hashes of all runs of a few words, to compare documents by."""
    words = text.split()
    return {
        int.from_bytes(
            hashlib.blake2b(" ".join(words[i : i + _RUN]).encode(), digest_size=8).digest()
        )
        for i in range(max(len(words) - _RUN + 1, 1))
    }


class Distinct:
    """Accepts a document unless it nearly repeats one accepted before."""

    def __init__(self) -> None:
        self._known: list[set[int]] = []

    def accept(self, document: Document) -> bool:
        """Whether the document is new; it counts as known from now on."""
        runs = word_runs(text_of(document))
        for known in self._known:
            if len(runs & known) > _SHARED * min(len(runs), len(known)):
                return False
        self._known.append(runs)
        return True


def exchanges(rng: random.Random) -> Iterator[Exchange]:
    """Reasoning without end: every generator once, in a new order, and again."""
    sense = rng.sample(range(everyday.COMMON_SENSE), everyday.COMMON_SENSE)
    while True:
        makers: list[Callable[[random.Random], Exchange]] = list(_REASONING)
        rng.shuffle(makers)
        for make in makers:
            yield make(rng)
        for number in sense[:2]:
            yield everyday.common_sense(rng, number)
        sense = sense[2:]


def office_exchanges(rng: random.Random) -> Iterator[Exchange]:
    """Answers without a trace, likewise."""
    while True:
        makers = list(office.GENERATORS)
        rng.shuffle(makers)
        for make in makers:
            yield make(rng)


def conversation(parts: Sequence[Exchange], rng: random.Random) -> Document:
    """One exchange, several in turn, or several questions asked at once."""
    messages: list[dict[str, str]] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    if len(parts) > 1 and rng.random() < 0.5 and all(part.thinking for part in parts):
        asked = "\n\n".join(f"{n}) {part.question}" for n, part in enumerate(parts, 1))
        thought = "\n\n".join(f"Question {n}. {part.thinking}" for n, part in enumerate(parts, 1))
        reply = "\n\n".join(f"**{n})** {part.reply}" for n, part in enumerate(parts, 1))
        messages += Exchange("several", asked, thought, reply, "").messages
    else:
        for part in parts:
            messages += part.messages
    return {"messages": messages}


def generated(source: str, stream: Iterator[Exchange], quota: int, seed: int) -> list[Document]:
    """Documents of at least `quota` bytes of lines, of 1 to 8 KB each, no two alike."""
    rng = random.Random(f"{source}:{seed}")
    distinct, documents, total = Distinct(), [], 0
    while total < quota:
        target, parts, size = rng.choice((1000, 1000, 1000, 1500, 2800)), [], 0
        while size < target:
            parts.append(next(stream))
            size += sum(len(message["content"].encode()) for message in parts[-1].messages)
        document = conversation(parts, rng)
        if len(text_of(document).encode()) <= 8000 and distinct.accept(document):
            document["source"] = source
            documents.append(document)
            total += size_of(document)
    return documents


def generated_parts(seed: int = SEED) -> dict[str, list[Document]]:
    """The generated documents by source: a function of the seed alone."""
    quota = {source: size for _, source, size in MIX}
    streams = {
        "generated-reasoning": exchanges(random.Random(f"reasoning:{seed}")),
        "generated-office": office_exchanges(random.Random(f"office:{seed}")),
    }
    return {s: generated(s, stream, quota[s], seed) for s, stream in streams.items()}


def selected(source: str, texts: Iterable[str], quota: int, seed: int) -> list[Document]:
    """Documents of a work, drawn at random until the quota is full."""
    rng = random.Random(f"{source}:{seed}")
    pool = [text for text in texts if sources.acceptable(text)]
    rng.shuffle(pool)
    distinct, documents, total = Distinct(), [], 0
    for text in pool:
        document: Document = {"text": text, "source": source}
        if total < quota and distinct.accept(document):
            documents.append(document)
            total += size_of(document)
    return documents


def public_domain(folder: Path, seed: int) -> dict[str, list[Document]]:
    """Documents from the extracted Debian packages."""
    rng = random.Random(f"cut:{seed}")
    texts = {
        "austen": sources.cut(sources.austen(folder), rng),
        "jargon-file": sources.cut(sources.jargon(folder), rng),
        "charters": sources.cut(sources.charters(folder), rng),
        "devils-dictionary": sources.cut(sources.devil(folder), rng),
        "bible-english": sources.cut(sources.scripture(folder, spanish=False), rng),
        "bible-spanish": sources.cut(sources.scripture(folder, spanish=True), rng),
        "sqlite-docs": [d for page in sources.sqlite(folder) for d in sources.cut(page, rng)],
    }
    quota = {source: size for _, source, size in MIX}
    return {s: selected(s, found, quota[s], seed) for s, found in texts.items()}


def frozen(path: Path) -> dict[str, list[Document]]:
    """The documents of an existing file by source, in their order."""
    documents: dict[str, list[Document]] = {source: [] for source in PART_OF}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            document = json.loads(line)
            documents[document["source"]].append(document)
    return documents


def interleave(by_source: dict[str, list[Document]]) -> list[Document]:
    """All documents, always going on with the source that is furthest behind its share in bytes.

    So every prefix of the file has the mix of the whole, whatever number of tokens a run reads.
    """
    whole = {s: sum(map(size_of, d)) for s, d in by_source.items()}
    done = dict.fromkeys(by_source, 0)
    queues = {s: iter(d) for s, d in by_source.items()}
    total, ordered = sum(whole.values()), list[Document]()
    for _ in range(sum(map(len, by_source.values()))):
        sofar = sum(done.values())
        left = [s for s in whole if done[s] < whole[s]]
        source = max(left, key=lambda s: whole[s] * sofar - done[s] * total)
        document = next(queues[source])
        done[source] += size_of(document)
        ordered.append(document)
    return ordered


def build(
    public: Path | None = None, repository: Path | None = None, seed: int = SEED
) -> list[Document]:
    """All documents in the order of the file."""
    by_source = frozen(OUTPUT)
    by_source.update(generated_parts(seed))
    if public is not None:
        by_source.update(public_domain(public, seed))
    if repository is not None:
        texts = sources.repository(repository, random.Random(f"cut:{seed}"))
        quota = {source: size for _, source, size in MIX}["repository"]
        by_source["repository"] = selected("repository", texts, quota, seed)
    return interleave({source: by_source[source] for source in PART_OF})


def main() -> None:
    """Build and write the file; say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--public-domain", type=Path, help="folder of extracted Debian packages")
    parser.add_argument("--repository", action="store_true", help="read code and docs again")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    documents = build(options.public_domain, ROOT if options.repository else None)
    data = "".join(map(line_of, documents)).encode()
    options.output.write_bytes(data)
    for source, part in PART_OF.items():
        sizes = [size_of(d) for d in documents if d["source"] == source]
        print(f"{part:<10} {source:<20} {len(sizes):>4} documents {sum(sizes):>8} bytes")
    print(f"{len(documents)} documents, {len(data)} bytes, {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()

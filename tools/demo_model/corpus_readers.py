"""Readers for the containers that the source texts come in, and the test of what counts as prose."""

import gzip
import hashlib
import html
import re
import struct
import zlib

from lxml import html as lxml_html

STOP_WORDS = set("""the of and to in is that it for was on are with as be this by not or from at which an have has can
you if will when a he his her she they we""".split())
_BLOCKS = {"p", "li", "dd", "blockquote"}
_CONTAINERS = _BLOCKS | {"ul", "ol", "dl", "div"}
_DROP = ('//script|//style|//nav|//pre|//table|//footer|//header|//svg|//form|//sup[@class="footnote"]|'
         '//*[@class="headerlink"]|//*[contains(@class,"navheader") or contains(@class,"navfooter") or '
         'contains(@class,"sidebar") or contains(@class,"related")]')
_ASCII = {"\u00a0": " ", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ",
          "\u2026": "...", "\u00b6": "", "\u00ad": ""}


def normalize(text):
    """Plain quotes and dashes, entities resolved, white space folded to single spaces."""
    text = html.unescape(text)
    for old, new in _ASCII.items():
        text = text.replace(old, new)
    return re.sub(r"\s+", " ", text).strip()


def is_prose(paragraph, min_chars=60):
    """Long enough, mostly letters, nearly ASCII, at least 8 words of which 18 % are stop words."""
    if len(paragraph) < min_chars:
        return False
    if sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph) < 0.80:
        return False
    if sum(ord(c) > 126 for c in paragraph) / len(paragraph) > 0.02:
        return False
    words = re.findall(r"[a-z']+", paragraph.lower())
    return len(words) >= 8 and sum(w in STOP_WORDS for w in words) / len(words) >= 0.18


class Deduplicator:
    """Remembers paragraphs by a hash of their letters; calling it says whether a paragraph is new."""

    def __init__(self):
        self.seen = set()

    def __call__(self, paragraph):
        letters = re.sub(r"\W+", "", paragraph.lower()).encode()
        digest = hashlib.blake2b(letters, digest_size=8).digest()
        new = digest not in self.seen
        self.seen.add(digest)
        return new


def read_text(path):
    """A text file, plain or .gz, UTF-8 or else Latin-1."""
    with (gzip.open(path) if path.endswith(".gz") else open(path, "rb")) as f:
        data = f.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def blank_line_paragraphs(text):
    return re.split(r"\n\s*\n", text.replace("\r", ""))


def chapters(text):
    """Split a novel at its chapter headings."""
    return [c for c in re.split(r"\n(?=(?:CHAPTER|Chapter|VOLUME)\b)", text) if len(c) > 400]


def html_paragraphs(path):
    """Text of p, li, dd and blockquote elements; code, tables and navigation are left out."""
    try:
        document = lxml_html.fromstring(read_text(path).encode(), parser=lxml_html.HTMLParser(encoding="utf-8"))
    except Exception:  # an unreadable page is skipped, not repaired
        return []
    for element in document.xpath(_DROP):
        if element.getparent() is not None:
            element.drop_tree()
    paragraphs = []
    for element in document.iter():
        if not isinstance(element.tag, str) or element.tag not in _BLOCKS:
            continue
        children = [c for c in element if isinstance(c.tag, str) and c.tag in _CONTAINERS]
        if children:  # only the inline text before the first nested block
            text = element.text or ""
            for child in element:
                if child is children[0]:
                    break
                text += child.text_content() + (child.tail or "")
        else:
            text = element.text_content()
        paragraphs.append(text)
    return paragraphs


def r_strings(path):
    """Character vectors of an R lazy-load file (.rdb): blocks of a 4-byte big-endian length and zlib data."""
    with open(path, "rb") as f:
        data = f.read()
    result, i = [], 0
    while i < len(data) - 5:
        stream = zlib.decompressobj()
        try:
            block = stream.decompress(data[i + 4:])
        except zlib.error:
            i += 1
            continue
        i = len(data) - len(stream.unused_data)
        lines = []
        for match in re.finditer(rb"\x00\x04\x00\x09|\x00\x08\x00\x09|\x00\x00\x00\x09", block):
            at = match.end()
            if at + 4 > len(block):
                break
            n = struct.unpack(">i", block[at:at + 4])[0]
            if 0 <= n < 2000:
                lines.append(block[at + 4:at + 4 + n].decode("utf-8", "replace"))
        result.append(lines)
    return result


def sword_chapters(folder):
    """Chapters (lists of verses) of a SWORD zText module, Old then New Testament."""
    result = []
    for part in ("ot", "nt"):
        index, text, verses = (open(f"{folder}/{part}.{e}", "rb").read() for e in ("bzs", "bzz", "bzv"))
        blocks = []
        for i in range(0, len(index) - 11, 12):
            offset, size, _ = struct.unpack("<III", index[i:i + 12])
            blocks.append(zlib.decompress(text[offset:offset + size]) if size else b"")
        chapter = []
        for i in range(0, len(verses) - 9, 10):
            block, offset, size = struct.unpack("<IIH", verses[i:i + 10])
            if not size or block >= len(blocks):  # an empty verse separates chapters
                if chapter:
                    result.append(chapter)
                chapter = []
                continue
            verse = blocks[block][offset:offset + size].decode("utf-8", "replace")
            verse = re.sub(r"<(note|title).*?</\1>", "", verse, flags=re.S)
            verse = normalize(re.sub(r"<[^>]+>", " ", verse))
            chapter.append(re.sub(r" ([,.;:!?])", r"\1", verse))
        if chapter:
            result.append(chapter)
    return result


def dictd_entries(data_path, index_path):
    """(headword, text) of a dictd dictionary; offsets are in dictd's base 64."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(digits):
        value = 0
        for c in digits:
            value = value * 64 + alphabet.index(c)
        return value

    with gzip.open(data_path) as f:
        data = f.read()
    with open(index_path, encoding="utf-8", errors="replace") as f:
        for line in f:
            word, offset, size = line.rstrip("\n").split("\t")[:3]
            if not word.startswith("00"):
                start = number(offset)
                yield word, data[start:start + number(size)].decode("utf-8", "replace")


def wordnet_sentences(folder):
    """WordNet data files -> one line per sense: 'word (part): gloss. Also called ... Example: ...'"""
    for suffix, part in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        with open(f"{folder}/data.{suffix}", encoding="utf-8") as f:
            for line in f:
                if line.startswith("  "):  # the licence at the head of the file
                    continue
                fields, gloss = line.split(" | ", 1)
                fields = fields.split()
                words = [re.sub(r"\(.*\)", "", fields[4 + 2 * i]).replace("_", " ") for i in range(int(fields[3], 16))]
                parts = [p.strip() for p in re.split(r';\s*(?=")', gloss.strip())]
                text = f"{words[0]} ({part}): {parts[0].rstrip(';')}."
                if len(words) > 1:
                    text += f" Also called {', '.join(words[1:4])}."
                for example in [p.strip('"; ') for p in parts[1:]][:2]:
                    text += f" Example: {example[:1].upper()}{example[1:]}."
                yield text

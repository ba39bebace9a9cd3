"""Real text without a download: the standard library's documentation and sources, and a small tokenizer for it."""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from common.cli import BadInput

PIECE = re.compile(r" ?[^\W\d]+| ?\d+|\n| +|.")  # a word, a number, a newline, a run of spaces, a symbol


def corpus(data: tuple[str, ...] | str = "docs") -> str:
    """The text that --data names, joined by blank lines: UTF-8 files, or Python's docs (0.5 MB) or sources (10 MB).

    FileNotFoundError: a file is missing. BadInput: it is empty, a folder, or not UTF-8.
    """
    names = (data,) if isinstance(data, str) else data
    return "\n\n".join(_docs() if n == "docs" else _sources() if n == "sources" else _file(n) for n in names)


def _docs() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a Python without its help texts
        return _sources()
    return "\n\n".join(topics[key] for key in sorted(topics))


def _sources() -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)
    return "\n\n".join(p.read_text(encoding="utf-8", errors="ignore") for p in files)


def _file(name: str) -> str:
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"--data {name}: no such file. Give a UTF-8 text file, or 'docs' or 'sources'.")
    if path.is_dir():
        raise BadInput(f"--data {name} is a folder. Name its files: --data {name}/*.txt")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise BadInput(f"--data {name} is not UTF-8 (byte {e.start}). Try: iconv -f latin1 -t utf8 {name}") from e
    if not text.strip():
        raise BadInput(f"--data {name} is empty. Give a file with text in it, or leave --data out.")
    return text


class Tokenizer:
    """Ids 0..255 are the bytes, id i >= 256 is pieces[i - 256]. Lossless: other pieces are spelled in bytes.

    Byte 0 does not occur in text, so a script may use it for its own ends.
    """

    def __init__(self, pieces: list[str]):
        self.pieces = list(pieces)
        self.ids = {p: [256 + i] for i, p in enumerate(self.pieces)}
        self.vocab = 256 + len(self.pieces)

    @classmethod
    def train(cls, text: str, vocab: int = 1024) -> "Tokenizer":
        """The vocab - 256 most frequent pieces over one byte, ties in alphabetical order. BadInput: vocab < 256."""
        if vocab < 256:
            raise BadInput(f"a vocabulary of {vocab} cannot hold the 256 bytes. Give --vocab 256 or more.")
        counts = Counter(p for p in PIECE.findall(text) if len(p.encode(errors="surrogatepass")) > 1)
        return cls(sorted(counts, key=lambda p: (-counts[p], p))[: vocab - 256])

    def encode(self, text: str) -> Tensor:
        """Ids as an int64 tensor (T,)."""
        ids = []
        for piece in PIECE.findall(text):
            ids += self.ids.get(piece) or piece.encode("utf-8", errors="surrogatepass")
        return torch.tensor(ids, dtype=torch.long)

    def decode(self, ids) -> str:
        """The text of a sequence of ids; byte strings that are not UTF-8 show as the replacement character."""
        return b"".join(self.piece(int(i)) for i in ids).decode("utf-8", errors="replace")

    def piece(self, i: int) -> bytes:
        """The bytes of one id."""
        return bytes([i]) if i < 256 else self.pieces[i - 256].encode("utf-8", errors="surrogatepass")

"""Real text without a download: the standard library's documentation, your own files, and a small tokenizer."""

import re
import sysconfig
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.cli import BadInput

PIECE = re.compile(r" ?[^\W\d]+| ?\d+|\n| +|.")  # a word, a number, a newline, a run of spaces, a symbol


def corpus(data: tuple[str, ...] | str = "docs") -> str | np.ndarray:
    """The text that --data names, joined by blank lines: UTF-8 files, Python's docs (0.5 MB) or sources (10 MB).

    A lone FILE.npy holds token ids (n,) instead: they stay on the disk, and a rank reads the rows it asks for.
    FileNotFoundError: a file is missing. BadInput: it is empty, a folder, not UTF-8, or not integers.
    """
    parts = [_read(name) for name in ((data,) if isinstance(data, str) else data)]
    if len(parts) > 1 and not all(isinstance(part, str) for part in parts):
        raise BadInput(f"--data {' '.join(data)}: a .npy file of token ids must stand alone.")
    return "\n\n".join(parts) if isinstance(parts[0], str) else parts[0]


def _read(name: str) -> str | np.ndarray:
    path = Path(name)
    if name == "docs":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    if name == "sources":
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)
        return "\n\n".join(p.read_text(encoding="utf-8", errors="ignore") for p in files)
    if not path.exists():
        raise FileNotFoundError(f"--data {name}: no such file. Give text files, one .npy file of ids, docs or sources.")
    if path.is_dir():
        raise BadInput(f"--data {name} is a folder. Name its files: --data {name}/*.txt")
    try:
        found = np.load(path, mmap_mode="r") if path.suffix == ".npy" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise BadInput(f"--data {name} is not UTF-8 (byte {e.start}). Try: iconv -f latin1 -t utf8 {name}") from e
    except (ValueError, EOFError) as e:
        raise BadInput(f"--data {name} is no whole .npy file ({e}). Write it with numpy.save(name, ids).") from e
    if isinstance(found, np.ndarray) and (found.ndim != 1 or found.dtype.kind not in "iu"):
        raise BadInput(f"--data {name} holds {found.dtype} {found.shape}; it needs integer token ids of shape (n,).")
    if isinstance(found, str) and not found.strip():
        raise BadInput(f"--data {name} is empty. Give a file with text in it, or leave --data out.")
    return found


def checksum(ids: np.ndarray) -> int:
    """CRC-32 of how many they are and of the ids, of 65,536 among them where a file is too long to be read whole."""
    part = ids if ids.size <= 2**24 else ids.reshape(-1)[:: ids.size // 2**16]
    return zlib.crc32(np.ascontiguousarray(part), ids.size % 2**32)


class Tokenizer:
    """Ids 0..255 are the bytes, later ones the most frequent pieces of `text`. Lossless; no text holds byte 0."""

    def __init__(self, text: str = "", vocab: int = 256):
        counts = Counter(piece.encode() for piece in PIECE.findall(text))
        frequent = sorted((p for p in counts if len(p) > 1), key=lambda p: (-counts[p], p))
        self.pieces = [bytes([i]) for i in range(256)] + frequent[: vocab - 256]
        self.ids = {piece: [i] for i, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> Tensor:
        """Ids as an int64 tensor (T,)."""
        pieces = (piece.encode() for piece in PIECE.findall(text))
        return torch.tensor([i for piece in pieces for i in self.ids.get(piece, piece)], dtype=torch.long)

    def decode(self, ids) -> str:
        """The text of a sequence of ids; byte strings that are not UTF-8 show as the replacement character."""
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

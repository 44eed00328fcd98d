"""`manifest.json`: what an index holds, and the checksum of every file. It is written last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shoulders.errors import ArtefactError
from shoulders.files import write_json

FILE = "manifest.json"
UNFINISHED = "unfinished.json"
FORMAT = 1
_LOCKS = (".tantivy-meta.lock", ".tantivy-writer.lock")  # empty, made anew when one opens it


class FileFacts(BaseModel):
    """Size and SHA-256 of a file. One that only grows may be longer: the rest is not ours yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str
    grows: bool = False


class EncoderFacts(BaseModel):
    """How texts became vectors, and the fingerprint of the encoder that did it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    fingerprint: str
    pooling: Literal["mean", "cls"]
    normalize: bool
    pair: bool
    max_tokens: int
    question_prompt: str = ""
    passage_prompt: str = ""


class DenseFacts(BaseModel):
    """The dense half: the encoders of questions and passages, and the vectors' file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: EncoderFacts
    passage: EncoderFacts
    dimensions: int
    dtype: Literal["float16", "float32"]


class SourceFacts(BaseModel):
    """Where passages came from, and how many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    kind: str
    passages: int


class Manifest(BaseModel):
    """What stands in `manifest.json`.

    Attributes:
        generation: counts finished changes; files that a change replaces carry it in their names.
        passages: how many there are, deleted ones not counted.
        rows: how many numbers are taken, deleted passages counted.
        content: the `Content` of all passages.
        store: folder of the passage store.
        deleted: file with the numbers of deleted passages, or None.
        approximate: file of the approximate index, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    version: str
    generation: int
    passages: int
    rows: int
    content: str
    analyzer: str
    sources: list[SourceFacts]
    store: str
    deleted: str | None = None
    dense: DenseFacts | None = None
    approximate: str | None = None
    files: dict[str, FileFacts]

    @property
    def bytes(self) -> int:
        """Size of the index on disk."""
        return sum(file.bytes for file in self.files.values())


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`.

    Raises `ArtefactError`, naming the folder, where there is no index, an unfinished one, or one
    of another format.
    """
    path = folder / FILE
    if not path.is_file():
        if (folder / UNFINISHED).is_file():
            raise ArtefactError(
                f"{folder}: the index is unfinished; go on with: shoulders index --resume "
                f"--out {folder}"
            )
        found = "no index in this folder" if folder.is_dir() else "no such folder"
        raise ArtefactError(f"{folder}: {found}; make one with: shoulders index SOURCE --out DIR")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and value.get("format") != FORMAT:
            raise ArtefactError(
                f"{path}: index format {value.get('format')!r}, this version reads {FORMAT}; "
                "build it again"
            )
        return Manifest.model_validate(value)
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"{path}: damaged ({reason}); build the index again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest: from this moment on the index is what it says."""
    write_json(folder / FILE, manifest.model_dump())


def facts_of(folder: Path, names: Iterable[str], growing: Iterable[str]) -> dict[str, FileFacts]:
    """Return size and checksum of files below `folder`, of all files where a name is a folder."""
    grows = set(growing)
    paths = sorted(p for name in [*names, *grows] for p in _files(folder / name))
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing lets go of the interpreter lock
        hashes = list(pool.map(_sha256, paths))
    return {
        (name := path.relative_to(folder).as_posix()): FileFacts(
            bytes=path.stat().st_size, sha256=found, grows=name in grows
        )
        for path, found in zip(paths, hashes, strict=True)
    }


def verify(folder: Path, manifest: Manifest, *, checksums: bool = True) -> None:
    """Compare every file with the manifest.

    Args:
        folder: of the index.
        manifest: of this folder.
        checksums: compare the bytes; else only that files are there in their sizes.

    Raises:
        ArtefactError: a file is missing, cut or changed; it is named.
    """
    again = "copy the index again or build it anew"
    for name, facts in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ArtefactError(f"{path}: missing; the index is not whole: {again}")
        if size < facts.bytes or (size > facts.bytes and not facts.grows):
            raise ArtefactError(
                f"{path}: {size:,} bytes, expected {facts.bytes:,}; the index is not whole: {again}"
            )
    if not checksums:
        return

    def changed(item: tuple[str, FileFacts]) -> str | None:
        name, facts = item
        return None if _sha256(folder / name, facts.bytes) == facts.sha256 else name

    with ThreadPoolExecutor(max_workers=2) as pool:
        for found in pool.map(changed, manifest.files.items()):
            if found is not None:
                raise ArtefactError(f"{folder / found}: damaged (its checksum differs); {again}")


def _sha256(path: Path, size: int | None = None) -> str:
    """Return the SHA-256 of the first `size` bytes of a file, by default of all."""
    left = path.stat().st_size if size is None else size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [p for p in path.rglob("*") if p.is_file() and p.name not in _LOCKS]


def remove(path: Path) -> None:
    """Remove a file or folder of an older generation, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)

"""Readers on disk: `reader.json` beside a skill's files, and the re-ranker's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shoulders import __version__
from shoulders.encoders.load import load_encoder
from shoulders.encoders.sentence import load_sentence_encoder
from shoulders.errors import ArtefactError
from shoulders.files import sha256_of_file, write_json
from shoulders.manifest import read_versioned
from shoulders.reader.reranker import Reranker, RetrieverScores
from shoulders.reader.rerankers.cross_encoder import load_cross_encoder
from shoulders.reader.rerankers.fused import FusedReranker, load_fusion
from shoulders.reader.rerankers.similarity import SimilarityReranker
from shoulders.skills.artefact import Bound
from shoulders.skills.reader import ReadingConfig

FILE = "reader.json"
RERANKER = "reranker"  # folder of the cross-encoder, inside the reader's
FUSION = "fusion.json"  # weights that join it with the retriever's scores
# What the fusion may join.
RETRIEVER, SIMILARITY, CROSS_ENCODER = "retriever", "similarity", "cross_encoder"
FORMAT_VERSION = 1

RetrieverKind = Literal["sparse", "dense", "approximate", "hybrid"]


class SearchConfig(BaseModel):
    """What finds passages: which retriever of an index, and how many for each question."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    retriever: RetrieverKind = "sparse"
    k: int = Field(default=20, ge=1)


class ReaderArtefact(BaseModel):
    """What `reader.json` holds.

    `similarity` is the frozen encoder that re-ranks, if one does; `files` are SHA-256 of the
    re-ranker's files by path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    shoulders_version: str
    search: SearchConfig
    reading: ReadingConfig
    similarity: Bound | None
    files: dict[str, str]
    provenance: dict[str, Any]


def save_reader(
    folder: Path,
    search: SearchConfig,
    reading: ReadingConfig,
    similarity: str | None,
    provenance: dict[str, Any],
) -> ReaderArtefact:
    """Write `reader.json` into a folder that holds a saved skill and perhaps a re-ranker.

    `similarity` names the frozen encoder that re-ranks, if one does. Raises `ShouldersError` where
    it cannot be written.
    """
    artefact = ReaderArtefact(
        format_version=FORMAT_VERSION,
        shoulders_version=__version__,
        search=search,
        reading=reading,
        similarity=_bound(similarity) if similarity else None,
        files=_hashes(folder),
        provenance=provenance,
    )
    write_json(folder / FILE, artefact.model_dump(mode="json"))
    return artefact


def read_reader(folder: Path) -> ReaderArtefact:
    """Read and check `reader.json` and the hashes of the re-ranker's files; loads no model.

    Raises `ArtefactError` naming the file and what is wrong with it.
    """
    artefact = read_versioned(folder, FILE, ReaderArtefact, FORMAT_VERSION, "reader")
    found = _hashes(folder)
    for name in sorted(artefact.files.keys() | found.keys()):
        if artefact.files.get(name) != found.get(name):
            what = "missing" if name not in found else "damaged, edited or not the reader's"
            raise ArtefactError(f"{folder / name}: {what}")
    return artefact


def load_reranker(folder: Path, similarity: str | None) -> Reranker | None:
    """Load the re-ranker of a reader's folder, None where it has none.

    Args:
        folder: with the fusion and, if it joins one, a cross-encoder.
        similarity: name of the frozen encoder, if the fusion joins one.

    Raises:
        ArtefactError: it is damaged.
        LMError: the encoder cannot be loaded.
    """
    if not (folder / FUSION).is_file():
        return None
    fusion = load_fusion(folder / FUSION)
    members: dict[str, Reranker] = {RETRIEVER: RetrieverScores()}
    if SIMILARITY in fusion.members and similarity is not None:
        members[SIMILARITY] = SimilarityReranker(load_sentence_encoder(similarity))
    if CROSS_ENCODER in fusion.members:
        members[CROSS_ENCODER] = load_cross_encoder(folder / RERANKER)
    return FusedReranker(members, fusion)


def open_reranker(folder: Path) -> Reranker | None:
    """Load the re-ranker of a saved reader; raises `ArtefactError` where its encoder is another."""
    bound = read_reader(folder).similarity
    if bound is None:
        return load_reranker(folder, None)
    found = _bound(bound.name)
    if found.fingerprint != bound.fingerprint:
        raise ArtefactError(
            f"{folder}: re-ranks with the encoder '{bound.name}' (fingerprint "
            f"{bound.fingerprint}), the one found has {found.fingerprint}"
        )
    return load_reranker(folder, bound.name)


def _bound(name: str) -> Bound:
    encoder = load_encoder(name)
    return Bound(name=name, fingerprint=encoder.fingerprint, parameters=encoder.parameters)


def _hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the re-ranker, by its path inside the reader."""
    files = [*sorted((folder / RERANKER).rglob("*")), folder / FUSION]
    return {str(f.relative_to(folder)): sha256_of_file(f) for f in files if f.is_file()}

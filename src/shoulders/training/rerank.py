"""The re-ranker's stage of a reader: score what was found in several ways, and join the scores.

Left in the output folder: `fusion.json` (how the scores become one probability) and, with a
cross-encoder, `reranker-folds/` (scores of training questions by models that did not see them) and
`reranker/` (the model for all others).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoulders.encoders.sentence import load_sentence_encoder
from shoulders.files import remove_partial
from shoulders.reader.answers import has_answer
from shoulders.reader.contexts import Ranked, as_ranked
from shoulders.reader.crossfit import cross_fitted
from shoulders.reader.index.index import Index
from shoulders.reader.mining import Mining, mined
from shoulders.reader.passage import Found, Passage, Retriever
from shoulders.reader.questions import Question
from shoulders.reader.reranker import Reranker, Scores, found_passages, reordered
from shoulders.reader.rerankers.cross_encoder import (
    FILE,
    CrossEncoderConfig,
    CrossEncoderReranker,
    save_cross_encoder,
)
from shoulders.reader.rerankers.fused import fit_fusion, save_fusion
from shoulders.reader.rerankers.similarity import SimilarityReranker
from shoulders.reader.rerankers.training import train_cross_encoder
from shoulders.reader.watch import Watch
from shoulders.skills.reader_artefact import (
    CROSS_ENCODER,
    FUSION,
    RERANKER,
    RETRIEVER,
    SIMILARITY,
    load_reranker,
)
from shoulders.training.reader_recipe import RerankingConfig

FOLDS = "reranker-folds"


@dataclass(frozen=True, slots=True)
class Reranking:
    """What the stage gives the ones after it.

    Attributes:
        reranker: for questions that were not trained on; None without one.
        ranked: the training questions' passages, as models that did not see them order them.
        facts: what happened, for the record.
    """

    reranker: Reranker | None
    ranked: list[Ranked]
    facts: dict[str, Any]


def retrieved(
    questions: Sequence[Question], retriever: Retriever, k: int, watch: Watch, batch: int = 64
) -> Found:
    """Search for every question, and tell of it."""
    found = Found([], [])
    with watch.stage("retrieving", len(questions)) as advance:
        for start in range(0, len(questions), batch):
            several = [q.question for q in questions[start : start + batch]]
            ids, scores = retriever.search(several, k)
            found.ids.extend(ids)
            found.scores.extend(scores)
            advance(len(several))
    return found


def first(found: Found, k: int) -> Found:
    """Return the first `k` passages of every question."""
    return Found([ids[:k] for ids in found.ids], [scores[:k] for scores in found.scores])


def trained_reranker(
    config: RerankingConfig | None,
    questions: Sequence[Question],
    retriever: Retriever,
    index: Index,
    k: int,
    out: Path,
    watch: Watch,
) -> Reranking:
    """Train the re-ranker of a reader; finished parts in `out` are used again.

    Raises:
        TrainingError: no question has both a passage with its answer and one without.
        DataError: a gold passage is not in the collection.
    """
    encoder = config.cross_encoder if config else None
    deep = retrieved(questions, retriever, max(k, encoder.mining.depth if encoder else k), watch)
    found = first(deep, k)
    passages = found_passages(found, index)
    if config is None:
        return Reranking(None, as_ranked(found, found, passages), {})
    # Scores as of questions that were not trained on.
    unseen: dict[str, Scores] = {RETRIEVER: found.scores}
    facts: dict[str, Any] = {}
    texts = [question.question for question in questions]
    if config.similarity is not None:
        similar = SimilarityReranker(load_sentence_encoder(config.similarity))
        with watch.stage("similarity of passages", sum(map(len, passages))) as advance:
            unseen[SIMILARITY] = similar.score(texts, passages, found.scores, on_pairs=advance)
    if encoder is not None:
        mining = mined(questions, first(deep, encoder.mining.depth), index, encoder.mining)
        facts = _facts(mining)
        unseen[CROSS_ENCODER] = _cross_encoder(
            encoder, questions, mining, found, passages, index.manifest.content, out, watch
        )
    labels = [
        [has_answer(passage.text, question.answers) for passage in own]
        for question, own in zip(questions, passages, strict=True)
    ]
    fusion = fit_fusion(unseen, labels)
    save_fusion(fusion, out / FUSION)
    ranked = as_ranked(found, reordered(found, fusion.probabilities(unseen)), passages)
    return Reranking(load_reranker(out, config.similarity), ranked, facts)


def _cross_encoder(
    config: CrossEncoderConfig,
    questions: Sequence[Question],
    mining: Mining,
    found: Found,
    passages: Sequence[Sequence[Passage]],
    content: str,
    out: Path,
    watch: Watch,
) -> Scores:
    """Train a cross-encoder on all questions, and return scores of others that did not see them."""

    def trained(kept: list[int], name: str) -> CrossEncoderReranker:
        examples = mining.among(kept)
        with watch.stage(name, config.epochs * len(examples)) as advance:
            return train_cross_encoder(examples, config, on_questions=advance).reranker

    scores = cross_fitted(
        lambda kept: trained(kept, f"re-ranker, one of {config.folds} folds"),
        [question.question for question in questions],
        passages,
        found.scores,
        folds=config.folds,
        seed=config.seed,
        cache=out / FOLDS,
        settings={
            **config.model_dump(mode="json"),
            "index": content,
            "right": [[q.gold_passage_id, *q.answers] for q in questions],
        },
    )
    if not (out / RERANKER / FILE).is_file():
        remove_partial(out)
        whole = trained(list(range(len(questions))), "re-ranker")
        save_cross_encoder(whole, out / RERANKER, _facts(mining))
    return scores


def _facts(mining: Mining) -> dict[str, Any]:
    return {
        "questions": len(mining.examples),
        "questions_trained_on": sum(example is not None for example in mining.examples),
        "without_positive": mining.without_positive,
        "without_negative": mining.without_negative,
        "false_negatives_left_out": mining.false_negatives,
    }

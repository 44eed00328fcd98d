"""The re-ranker's stage of a reader: mine, cross-fit, then train on all questions.

Left in the output folder: `reranker-folds/` (scores of training questions by models that did not
see them), `reranker/` (the model for all others) and `fusion.json` (how its scores and the
retriever's become one probability).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoulders.files import remove_partial
from shoulders.reader.answers import has_answer
from shoulders.reader.contexts import Ranked, as_ranked
from shoulders.reader.crossfit import cross_fitted
from shoulders.reader.index.index import Index
from shoulders.reader.mining import Mining, mined
from shoulders.reader.passage import Found, Retriever
from shoulders.reader.questions import Question
from shoulders.reader.reranker import Reranker, found_passages, reordered
from shoulders.reader.rerankers.cross_encoder import (
    FILE,
    CrossEncoderConfig,
    CrossEncoderReranker,
    save_cross_encoder,
)
from shoulders.reader.rerankers.fused import fit_fusion, save_fusion
from shoulders.reader.rerankers.training import train_cross_encoder
from shoulders.reader.watch import Watch
from shoulders.skills.reader_artefact import (
    CROSS_ENCODER,
    FUSION,
    RERANKER,
    RETRIEVER,
    load_reranker,
)

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
    config: CrossEncoderConfig | None,
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
    deep = retrieved(questions, retriever, max(k, config.mining.depth if config else k), watch)
    found = first(deep, k)
    passages = found_passages(found, index)
    if config is None:
        return Reranking(None, as_ranked(found, found, passages), {})
    mining = mined(questions, first(deep, config.mining.depth), index, config.mining)

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
            "index": index.manifest.content,
            "right": [[q.gold_passage_id, *q.answers] for q in questions],
        },
    )
    if not (out / RERANKER / FILE).is_file():
        remove_partial(out)
        whole = trained(list(range(len(questions))), "re-ranker")
        save_cross_encoder(whole, out / RERANKER, _facts(mining))
    labels = [
        [has_answer(passage.text, question.answers) for passage in own]
        for question, own in zip(questions, passages, strict=True)
    ]
    unseen = {RETRIEVER: found.scores, CROSS_ENCODER: scores}
    fusion = fit_fusion(unseen, labels)
    save_fusion(fusion, out / FUSION)
    ranked = as_ranked(found, reordered(found, fusion.probabilities(unseen)), passages)
    return Reranking(load_reranker(out), ranked, _facts(mining))


def _facts(mining: Mining) -> dict[str, Any]:
    return {
        "questions": len(mining.examples),
        "questions_trained_on": sum(example is not None for example in mining.examples),
        "without_positive": mining.without_positive,
        "without_negative": mining.without_negative,
        "false_negatives_left_out": mining.false_negatives,
    }

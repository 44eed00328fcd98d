"""Hard negatives: what the retriever ranks high although it does not hold the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from shoulders.reader.answers import has_answer
from shoulders.reader.passage import Collection, Found, Passage, Retriever
from shoulders.reader.questions import Question

BATCH = 64  # questions searched at once


class MiningConfig(BaseModel):
    """What a re-ranker is trained on.

    Attributes:
        depth: passages retrieved for each question.
        negatives: most passages without an answer to keep, best first.
        positives: most passages with an answer to keep, the gold passage first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int = Field(default=50, ge=1)
    negatives: int = Field(default=5, ge=1)
    positives: int = Field(default=1, ge=1)


@dataclass(frozen=True, slots=True)
class Mined:
    """A question, passages that hold its answer, and misleading ones that do not."""

    question: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class Mining:
    """What was mined, and what was left out.

    Attributes:
        examples: for each question what to train on, None where that is not possible.
        without_positive: questions whose answer no known passage holds.
        without_negative: questions all of whose retrieved passages hold the answer.
        false_negatives: retrieved passages not taken as negatives since they hold an answer.
    """

    examples: list[Mined | None]
    without_positive: int
    without_negative: int
    false_negatives: int

    def among(self, kept: Sequence[int]) -> list[Mined]:
        """Return the examples of the questions with these indices."""
        return [example for i in kept if (example := self.examples[i]) is not None]


def mine(
    questions: Sequence[Question],
    retriever: Retriever,
    collection: Collection,
    config: MiningConfig | None = None,
    *,
    on_questions: Callable[[int], None] | None = None,
) -> Mining:
    """Search for every question and sort what is found by whether it holds an answer.

    The gold passage is a positive whether or not an answer is found in it. What holds an answer in
    its text or title, or has a positive's words, is never a negative. Deterministic.

    Raises `DataError` for a gold passage that is not in the collection.
    """
    config = config or MiningConfig()
    found = Found([], [])
    for start in range(0, len(questions), BATCH):
        batch = [question.question for question in questions[start : start + BATCH]]
        ids, scores = retriever.search(batch, config.depth)
        found.ids.extend(ids)
        found.scores.extend(scores)
        if on_questions is not None:
            on_questions(len(batch))
    return mined(questions, found, collection, config)


def mined(
    questions: Sequence[Question], found: Found, collection: Collection, config: MiningConfig
) -> Mining:
    """Do what `mine` does with passages that were found before."""
    examples: list[Mined | None] = []
    without_positive = without_negative = false_negatives = 0
    for question, ids in zip(questions, found.ids, strict=True):
        gold = question.gold_passage_id
        wanted = list(dict.fromkeys([*([] if gold is None else [gold]), *ids]))
        positives: list[Passage] = []
        others: list[Passage] = []
        for passage in collection.passages(wanted):
            # As retrieval is scored, by the text alone; but an answer in the title misleads nobody.
            if passage.id == gold or has_answer(passage.text, question.answers):
                positives.append(passage)
            elif not has_answer(passage.title, question.answers):
                others.append(passage)
        false_negatives += sum(passage.id != gold for passage in positives)
        # Collections repeat themselves: a copy of a positive under another id is none either.
        words = {passage.text for passage in positives}
        negatives = [passage for passage in others if passage.text not in words]
        without_positive += not positives
        without_negative += bool(positives) and not negatives
        example = Mined(
            question.question,
            tuple(positives[: config.positives]),
            tuple(negatives[: config.negatives]),
        )
        examples.append(example if positives and negatives else None)
    return Mining(examples, without_positive, without_negative, false_negatives)

"""UPR: how likely the frozen LM finds the question, given the passage. Nothing is trained.

Sachan et al. 2022, "Improving Passage Retrieval with Zero-Shot Question Generation" (arXiv
2204.07496): the score is the mean log-likelihood of the question's tokens after the passage and
an instruction to write a question about it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shoulders.errors import WindowError
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.score import score
from shoulders.lm.streams import Streams
from shoulders.reader.passage import Passage
from shoulders.reader.reranker import OnPairs, Scores, check_shapes, headed, length_sorted

BATCH_TOKENS = 2048
BATCH_ROWS = 32
MOST_CHARACTERS_A_TOKEN = 32  # see `cross_encoder`
_PASSAGE = "{passage}"


class LikelihoodConfig(BaseModel):
    """What the LM is told.

    Attributes:
        instruction: stands before the question; `{passage}` in it is the passage's place.
        max_passage_tokens: what a passage has more is cut off at its end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # The paper's words; its LMs were tuned to follow instructions, others need the last line.
    instruction: str = (
        "Passage: {passage}\nPlease write a question based on this passage.\nQuestion:"
    )
    max_passage_tokens: int = Field(default=192, ge=1)

    @field_validator("instruction")
    @classmethod
    def _has_a_place(cls, instruction: str) -> str:
        if instruction.count(_PASSAGE) != 1 or instruction.endswith(_PASSAGE):
            raise ValueError("must hold {passage} once, and end with something else")
        return instruction


class LikelihoodReranker:
    """Scores a passage by the frozen LM's mean log-likelihood (nats a token) of the question."""

    def __init__(self, lm: FrozenLM, config: LikelihoodConfig | None = None) -> None:
        self.lm = lm
        self.config = config or LikelihoodConfig()

    def score(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        retrieved: Sequence[Sequence[float]],
        *,
        on_pairs: OnPairs | None = None,
    ) -> Scores:
        """Return the mean log-likelihoods, computed in batches of similar length.

        Raises `WindowError` for a question that leaves no room for a passage.
        """
        check_shapes(questions, passages, retrieved)
        if not questions:
            return []  # the tokenizer wants a text at least
        asked = self.lm.tokenize([" " + q.strip() for q in questions])
        owners = [q for q, own in enumerate(passages) for _ in own]
        rows = self._rows(passages, [len(asked[q]) for q in owners])
        batches = length_sorted(
            [len(ids) + len(asked[q]) for ids, q in zip(rows, owners, strict=True)],
            BATCH_TOKENS,
            BATCH_ROWS,
        )

        def one(batch: list[int]) -> list[float]:
            prompt = Prompt.empty(len(batch), self.lm.device)
            continuations = [[asked[owners[i]]] for i in batch]
            scored = score(self.lm, prompt, [rows[i] for i in batch], continuations)
            return [alone.mean for (alone,) in scored]

        means = [0.0] * len(rows)
        with Streams.of(self.lm, None if len(batches) > 1 else 1) as streams:
            for batch, values in zip(batches, streams.map(one, batches), strict=True):
                for i, value in zip(batch, values, strict=True):
                    means[i] = value
                if on_pairs is not None:
                    on_pairs(len(batch))
        rest = iter(means)
        return [[next(rest) for _ in own] for own in passages]

    def _rows(self, passages: Sequence[Sequence[Passage]], asked: Sequence[int]) -> list[list[int]]:
        """Return the ids before the question of every pair; `asked` are the questions' lengths."""
        before, after = self.config.instruction.split(_PASSAGE)
        head, tail = self.lm.tokenize([before, after])
        head = [*self.lm.start_ids, *head]
        most = MOST_CHARACTERS_A_TOKEN * self.config.max_passage_tokens
        # A passage comes back for many questions.
        texts = list(dict.fromkeys(headed(p)[:most] for own in passages for p in own))
        ids = dict(zip(texts, self.lm.tokenize(texts), strict=True)) if texts else {}
        rows = []
        pairs = (passage for own in passages for passage in own)
        for passage, length in zip(pairs, asked, strict=True):
            room = self.lm.max_positions - len(head) - len(tail) - length
            if room < 1 or length < 1:
                raise WindowError(
                    f"a question of {length} tokens cannot be scored: beside the instruction the "
                    f"window has {max(room + length, 0)}"
                )
            limit = min(room, self.config.max_passage_tokens)
            rows.append(head + ids[headed(passage)[:most]][:limit] + tail)
        return rows

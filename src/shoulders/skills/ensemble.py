"""Several skills that answer together: an ensemble around one frozen LM.

Each member reads every row with its own prompt and in its own format; next tokens are chosen from
the mean of the members' distributions, and candidates scored by it. Tuned copies of an LM would
take its weights once per member; here all are rows of one batch, and the LM is in memory once
(prompt ensembling, Lester et al. 2021, arXiv 2104.08691, who let the members vote).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from shoulders.data.batching import length_grouped
from shoulders.errors import ShouldersError
from shoulders.lm.decode import Completion, DecodingConfig, Delta, completed, streamed
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.score import Score, score_whole
from shoulders.lm.together import Together
from shoulders.skills.config import BATCH_ROWS, BATCH_TOKENS, SkillConfig
from shoulders.skills.framing import Unprefixed, any_texts, stripped
from shoulders.skills.generating import batched
from shoulders.skills.skill import Skill


class Ensemble:
    """Skills of one pass that answer together.

    Each reads every row with its own prompt, in its own format; the next token is chosen from the
    mean of their distributions. All are rows of one batch around the one LM.

    Args:
        members: two or more on the same LM, each of one pass; their answers begin alike
            (`format.answer_prefix`), their inputs need not.

    Raises:
        ShouldersError: says which member does not fit.

    Examples:
        >>> ensemble = Ensemble([skill, other])  # doctest: +SKIP
        >>> ensemble.generate(["What is the opposite of hot?"], DecodingConfig())  # doctest: +SKIP
    """

    def __init__(self, members: Sequence[Skill]) -> None:
        self.members = tuple(members)
        if len(self.members) < 2:
            raise ShouldersError(f"an ensemble has two members or more, this has {len(members)}")
        first = self.members[0]
        for number, one in enumerate(self.members, 1):
            if one.lm is not first.lm:
                raise ShouldersError(f"member {number} of the ensemble is on another LM")
            if one.proposals is not None or one.parts.earlier:
                raise ShouldersError(
                    f"member {number} of the ensemble has several passes: members have one each"
                )
            prefixes = first.config.format.answer_prefix, one.config.format.answer_prefix
            if prefixes[0] != prefixes[1]:
                raise ShouldersError(
                    f"member {number} of the ensemble begins answers with {prefixes[1]!r}, "
                    f"the first with {prefixes[0]!r}"
                )

    @property
    def lm(self) -> FrozenLM:
        """The one frozen LM."""
        return self.members[0].lm

    @property
    def config(self) -> SkillConfig:
        """Of the first member; of the others only the answers' beginning is the same."""
        return self.members[0].config

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters of all members."""
        return sum(one.trained_parameters for one in self.members)

    def keeping(self, keep: str) -> Ensemble:
        """Return this ensemble with truncation of over-long inputs allowed, see `Skill.keeping`."""
        return Ensemble([one.keeping(keep) for one in self.members])

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """Return each member's prompts for `b` texts: as many of `b` rows (or one, shared)."""
        return [one.prompt(texts) for one in self.members]

    def asking_ids(self, texts: Sequence[str], decoding: DecodingConfig) -> list[list[list[int]]]:
        """Return each member's token ids of every text, see `Skill.asking_ids`."""
        return [one.asking_ids(texts, decoding) for one in self.members]

    def generate(
        self,
        texts: Sequence[str],
        decoding: DecodingConfig | None = None,
        *,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Generate `decoding.n` answers per text, see `Skill.generate`."""
        if not any_texts(texts):
            return []
        decoding = decoding or DecodingConfig()
        ids = self.asking_ids(texts, decoding)

        def one(rows: list[int]) -> list[list[Completion]]:
            deltas = self._streamed(
                [texts[i] for i in rows], [[own[i] for i in rows] for own in ids], decoding
            )
            return completed(deltas, len(rows), decoding.n)

        longest = [max(map(len, own)) for own in zip(*ids, strict=True)]
        limits = (max(1, limit // len(self.members)) for limit in (BATCH_ROWS, BATCH_TOKENS))
        answers = batched(self.lm, longest, decoding, one, on_rows, *limits)
        prefix = self.config.format.answer_prefix
        return [[stripped(c, prefix) for c in several] for several in answers]

    def stream(self, text: str, decoding: DecodingConfig) -> Iterator[Delta]:
        """Generate for one text, yielding pieces of text as they become certain."""
        ids = self.asking_ids([text], decoding)
        unprefixed = Unprefixed(self.config.format.answer_prefix)
        deltas = self._streamed([text], ids, decoding)
        return (found for delta in deltas if (found := unprefixed(delta)) is not None)

    @torch.no_grad()
    def score(
        self,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[list[Score]]:
        """Return the log-likelihood of each text's candidate answers, see `Skill.score`."""
        if len(texts) != len(answers):
            raise ShouldersError(f"{len(texts)} texts and candidates for {len(answers)} of them")
        if not any_texts(texts):
            return []
        candidates = [self.members[0].answer_ids(several) for several in answers]
        longest = [max(map(len, own), default=1) for own in candidates]
        width = max([1, *map(len, candidates)]) * len(self.members)  # whole rows for each of them
        ids = [one.input_ids(texts, longest) for one in self.members]
        every = zip(longest, zip(*ids, strict=True), strict=True)
        lengths = [max(map(len, own)) + room for room, own in every]
        results: list[list[Score]] = [[] for _ in texts]
        limits = max(1, BATCH_TOKENS // width), max(1, BATCH_ROWS // width)
        for rows in length_grouped(lengths, *limits):
            owner = [row for row in rows for _ in candidates[row]]
            asked = [own[row] for own in ids for row in owner]
            wanted = [c for row in rows for c in candidates[row]] * len(self.members)
            read = [i + c[:-1] for i, c in zip(asked, wanted, strict=True)]
            prompt = Prompt.stack(self.prompts([texts[row] for row in owner]))
            embedded = self.lm.embed_rows(read)
            scores = score_whole(self.lm, prompt, embedded, asked, wanted, len(self.members))
            for row, score in zip(owner, scores, strict=True):
                results[row].append(score)
            if on_rows is not None:
                on_rows(len(rows))
        return results

    def _streamed(
        self, texts: Sequence[str], ids: Sequence[list[list[int]]], decoding: DecodingConfig
    ) -> Iterator[Delta]:
        decoding = decoding.behind(self.config.format.answer_prefix)
        with torch.no_grad():
            together = Together(self.lm, self.prompts(texts), ids, decoding.max_new_tokens)
        yield from streamed(self.lm, together, ids[0], decoding)

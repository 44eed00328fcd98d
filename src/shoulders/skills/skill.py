"""`Skill`: what one frozen LM can do with one set of small trained networks around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.errors import ShouldersError
from shoulders.lm.decode import Completion, DecodingConfig, Delta, stream
from shoulders.lm.decoder import Source
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.score import Score
from shoulders.prompts.interface import Producer
from shoulders.recursion.chain import FirstStates, Hop, Hops, embeddings
from shoulders.skills.config import SkillConfig, TextFormat
from shoulders.skills.framing import Framing, Unprefixed, any_texts, stripped
from shoulders.skills.generating import generated
from shoulders.skills.parts import Parts, build_parts, encoders_of, written
from shoulders.skills.proposals import OnRows, Proposals, Proposed
from shoulders.skills.scoring import scored

NO_PARTS = Parts((), None, None)


class Skill:
    """A frozen LM, the networks around it (none: the bare LM) and a text format.

    Most skills are one pass with a prompt. Where earlier passes hand on their states (neural
    recursion) they write the embeddings that the last pass reads; where they hand on text
    (`proposals`, textual recursion) they rewrite its input.

    Examples:
        >>> from shoulders.lm.load import load_lm
        >>> base = Skill.base(load_lm("embedded"))
        >>> base.generate(["Name the capital of France."], DecodingConfig(max_new_tokens=3))[0]
        ...     # doctest: +SKIP
    """

    def __init__(
        self,
        lm: FrozenLM,
        config: SkillConfig,
        parts: Parts = NO_PARTS,
        proposals: Proposals | None = None,
        first: FirstStates | None = None,
    ) -> None:
        self.lm = lm
        self.config = config
        self.parts = parts
        self.proposals = proposals
        self._first = first

    @classmethod
    def base(cls, lm: FrozenLM, config: SkillConfig | None = None) -> Skill:
        """Return the bare LM as a skill: no prompt, nothing trained.

        By default it is addressed as it was tuned to be: through its chat template, if it has
        one, and with the plain text and separator otherwise.
        """
        if config is None and lm.tokenizer.chat_template:
            config = SkillConfig(format=TextFormat(chat=True, answer_prefix=""))
        return cls(lm, config or SkillConfig())

    @classmethod
    def create(
        cls,
        lm: FrozenLM,
        config: SkillConfig,
        encoder: Callable[[str], FrozenEncoder],
        random: torch.Generator | None = None,
    ) -> Skill:
        """Build a skill from its configuration; `random` initialises its trained values.

        Without `random` the values are left to be loaded.
        """
        before = config.before_text()
        proposals = None
        if before is not None:
            proposals = Proposals(cls.create(lm, before[0], encoder, random), before[1])
        return cls(lm, config, build_parts(lm, config, encoder, random), proposals)

    def keeping(self, keep: str) -> Skill:
        """Return this skill with truncation of over-long inputs allowed.

        `keep` is the part that stays, `start` or `end`: where the instruction stands. Raises
        `ShouldersError` for any other.
        """
        if keep not in ("start", "end"):
            raise ShouldersError(f"keep '{keep}': use start or end")
        form = self.config.format.model_copy(update={"keep": keep})
        config = self.config.model_copy(update={"format": form})
        before = self.proposals
        if before is not None:
            before = Proposals(before.skill.keeping(keep), before.config)
        return Skill(self.lm, config, self.parts, before)

    @property
    def last(self) -> Skill:
        """This skill's passes after the last text: it reads inputs that hold candidates already."""
        return Skill(self.lm, self.config, self.parts)

    def remembering(self, first: FirstStates) -> Skill:
        """Return this skill with a first pass that need not be computed again and again.

        Raises `ShouldersError` where the first pass has a prompt, so that its states change.
        """
        if not self.parts.earlier or self.parts.earlier[0].producer is not None:
            raise ShouldersError("only a first pass without a prompt can be remembered")
        return Skill(self.lm, self.config, self.parts, self.proposals, first)

    # -- facts ---------------------------------------------------------------------------

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters, all of them outside the LM."""
        own = sum(p.numel() for p in self.trained.parameters()) if self.trained else 0
        return own + (self.proposals.skill.trained_parameters if self.proposals else 0)

    @property
    def producer(self) -> Producer | None:
        """The producer of the last pass's prompt."""
        return self.parts.producer

    @property
    def trained(self) -> nn.Module | None:
        """The networks of the passes after the last text, as one module."""
        return self.parts.trained

    def networks(self) -> list[nn.Module]:
        """Return everything trained: of the passes before each text, and of those after the last.

        Their tensors' names differ, since they hold the number of their pass.
        """
        before = self.proposals.skill.networks() if self.proposals else []
        return [*before, *([self.trained] if self.trained is not None else [])]

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoders that the skill reads with, each once."""
        before = list(self.proposals.skill.encoders()) if self.proposals else []
        yield from before
        for encoder in encoders_of(self.parts):
            if not any(encoder is other for other in before):
                yield encoder

    # -- computing -----------------------------------------------------------------------

    def prompt(self, texts: Sequence[str]) -> Prompt:
        """Return the last pass's prompts for `b` input texts: `b` rows, or one that is shared."""
        return self.written(-1, texts)

    def written(self, number: int, texts: Sequence[str]) -> Prompt:
        """Return the prompts of a pass after the last text, by its place; -1 is the last pass."""
        config = self.config.passes[self.config.stage[number]]
        producer = self.producer if number < 0 else self.parts.earlier[number].producer
        return written(producer, [config.producer_text(text) for text in texts], self.lm)

    def embedded(
        self,
        texts: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        *,
        recompute: bool = False,
    ) -> Tensor | None:
        """Return what earlier passes write for the last one to read, rows end to end, `[t, d]`.

        None where there is no earlier pass: then it reads the LM's own embeddings.
        """
        if not self.parts.earlier:
            return None
        hops = self._hops(texts)
        return embeddings(self.lm, hops, token_ids, first=self._first, recompute=recompute)

    def source(self, texts: Sequence[str]) -> Source | None:
        """Return what writes the last pass's embeddings while it generates; None as above."""
        return Hops(self.lm, self._hops(texts)) if self.parts.earlier else None

    def _hops(self, texts: Sequence[str]) -> list[Hop]:
        return [Hop(self.written(i, texts), one.link) for i, one in enumerate(self.parts.earlier)]

    def input_ids(
        self, texts: Sequence[str], answer_room: int | Sequence[int] = 1
    ) -> list[list[int]]:
        """Return each text's token ids as they stand before the answer; see `Framing`."""
        return self._framing.input_ids(texts, answer_room)

    def asking_ids(self, texts: Sequence[str], decoding: DecodingConfig) -> list[list[int]]:
        """Return `input_ids` with room for what is to be generated; see `Framing.answer_room`."""
        return self.input_ids(texts, self._framing.answer_room(decoding.max_new_tokens))

    def input_room(self, answer_room: int = 1) -> int:
        """Return how many tokens of input fit beside prompt, separator and so long an answer."""
        return self._framing.input_room(answer_room)

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Return each answer's token ids, with the LM's end token."""
        return self._framing.answer_ids(answers)

    def proposed(self, texts: Sequence[str], *, on_rows: OnRows | None = None) -> list[Proposed]:
        """Return what the passes before the last text propose for every input.

        Raises `ShouldersError` for a skill without such passes.
        """
        if self.proposals is None:
            raise ShouldersError("this skill has no pass that proposes text")
        return self.proposals.propose(texts, self.last, on_rows=on_rows)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of an input text."""
        return len(self.lm.tokenize([text])[0])

    @property
    def prompt_length(self) -> int:
        """Window positions that the longest prompt of its passes takes."""
        return self.parts.prompt_length

    @property
    def _framing(self) -> Framing:
        return Framing(self.lm, self.config.format, self.prompt_length)

    def generate(
        self,
        texts: Sequence[str],
        decoding: DecodingConfig | None = None,
        *,
        on_rows: OnRows | None = None,
    ) -> list[list[Completion]]:
        """Generate `decoding.n` answers per text, in batches of similar length.

        Args:
            texts: inputs as they stand in the data (the format is applied here).
            decoding: greedy or sampled, and how long; greedy without.
            on_rows: called with the number of rows after each batch, for a progress bar.

        Returns:
            For every text, in order, `decoding.n` answers. A chooser that takes a sample as it is
            has one, whose length and end were `propose`'s.

        Raises:
            WindowError: names the row (from 1) that does not fit.
            ShouldersError: `texts` is one text and no list; several answers of a chooser.
        """
        if not any_texts(texts):
            return []
        decoding = decoding or DecodingConfig()
        if self.proposals is not None:
            return self.proposals.answered(texts, self.last, decoding, on_rows)
        decoding = decoding.behind(self.config.format.answer_prefix)
        answers = generated(self, texts, self.asking_ids(texts, decoding), decoding, on_rows)
        prefix = self.config.format.answer_prefix
        return [[stripped(c, prefix) for c in several] for several in answers]

    def stream(self, text: str, decoding: DecodingConfig) -> Iterator[Delta]:
        """Generate for one text, yielding pieces of text as they become certain.

        Raises `WindowError` where it does not fit.
        """
        if self.proposals is not None:
            return self.proposals.streamed(text, self.last, decoding)
        decoding = decoding.behind(self.config.format.answer_prefix)
        with torch.no_grad():
            prompt, source = self.prompt([text]), self.source([text])
        ids = self.asking_ids([text], decoding)
        deltas = stream(self.lm, prompt, ids, decoding, source)
        unprefixed = Unprefixed(self.config.format.answer_prefix)
        return (found for delta in deltas if (found := unprefixed(delta)) is not None)

    def score(
        self,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        on_rows: OnRows | None = None,
    ) -> list[list[Score]]:
        """Return the log-likelihood of each text's candidate answers, end token included.

        Args:
            texts: inputs as they stand in the data.
            answers: candidates of each text.
            on_rows: called with the number of rows after each batch.

        Returns:
            For every text a score of each candidate: the sum over its tokens, in nats.

        Raises:
            ShouldersError: `texts` and `answers` are not as many.
            WindowError: a row with its longest candidate does not fit.
        """
        if len(texts) != len(answers):
            raise ShouldersError(f"{len(texts)} texts and candidates for {len(answers)} of them")
        if not any_texts(texts):
            return []
        for several in answers:
            any_texts(several)
        if self.proposals is not None:
            texts = [found.text for found in self.proposed(texts)]
        return scored(self, texts, answers, on_rows)

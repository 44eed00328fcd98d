"""`Skill`: what one frozen LM can do with one set of small trained networks around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from shoulders.data.batching import length_grouped
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.errors import LMError, ShouldersError, WindowError
from shoulders.lm.decode import Completion, DecodingConfig, Delta, generate, stream
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.score import Score, score
from shoulders.lm.streams import Streams
from shoulders.prompts.build import build_producer
from shoulders.prompts.interface import Producer, Surroundings
from shoulders.skills.config import SkillConfig, TextFormat

# Rows that are computed together: enough to keep two cores or a GPU busy, small in memory.
BATCH_TOKENS = 2048
BATCH_ROWS = 64


class Skill:
    """A frozen LM, the producer of its prompt (None: the bare LM) and a text format.

    Example:
        >>> from shoulders.lm.load import load_lm
        >>> base = Skill.base(load_lm("embedded"))
        >>> base.generate(["Name the capital of France."], DecodingConfig(max_new_tokens=3))[0]
        ...     # doctest: +SKIP
    """

    def __init__(self, lm: FrozenLM, config: SkillConfig, producer: Producer | None) -> None:
        self.lm = lm
        self.config = config
        self.producer = producer

    @classmethod
    def base(cls, lm: FrozenLM, config: SkillConfig | None = None) -> Skill:
        """Return the bare LM as a skill: no prompt, nothing trained.

        By default it is addressed as it was tuned to be: through its chat template, if it has
        one, and with the plain text and separator otherwise.
        """
        if config is None and lm.tokenizer.chat_template:
            config = SkillConfig(format=TextFormat(chat=True, answer_prefix=""))
        return cls(lm, config or SkillConfig(), None)

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
        spec = config.passes[0].prompt
        if spec is None:
            return cls(lm, config, None)
        producer = build_producer(spec, Surroundings(lm, encoder))
        if random is not None:
            producer.initialise(lm, random)
        return cls(lm, config, producer)

    def keeping(self, keep: str) -> Skill:
        """Return this skill with truncation of over-long inputs allowed.

        `keep` is the part that stays, `start` or `end`: where the instruction stands.
        """
        if keep not in ("start", "end"):
            raise ShouldersError(f"keep '{keep}': use start or end")
        form = self.config.format.model_copy(update={"keep": keep})
        return Skill(self.lm, self.config.model_copy(update={"format": form}), self.producer)

    # -- facts ---------------------------------------------------------------------------

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters, all of them outside the LM."""
        return sum(p.numel() for p in self.producer.parameters()) if self.producer else 0

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoders that the skill reads with."""
        if self.producer is not None:
            yield from self.producer.encoders()

    # -- computing -----------------------------------------------------------------------

    def prompt(self, texts: Sequence[str]) -> Prompt:
        """Return the prompts of `b` input texts."""
        if self.producer is None:
            return Prompt.empty(len(texts), self.lm.device)
        return self.producer(texts)

    def input_ids(self, texts: Sequence[str], answer_room: int = 1) -> list[list[int]]:
        """Return each text's token ids with the separator, as they stand before the answer.

        Raises `WindowError`, naming the row, for a text that with the prompt and
        `answer_room` positions does not fit, unless the format says what to keep of it.
        """
        form = self.config.format
        head, tail = self._frame()
        limit = self.input_room(answer_room)
        rows = []
        for i, ids in enumerate(self.lm.tokenize(texts)):
            if len(ids) > limit and form.keep is None:
                raise WindowError(
                    f"row {i + 1} ('{texts[i][:40]}...'): {len(ids)} tokens, {max(limit, 0)} fit "
                    f"(window {self.lm.max_positions}, prompt {self._prompt_length}, "
                    f"answer {answer_room}); "
                    "shorten it, or allow truncation with keep: start or keep: end"
                )
            if limit < 1:
                raise WindowError(f"no room for any input: the window has {self.lm.max_positions}")
            cut = ids[:limit] if form.keep == "start" else ids[-limit:]
            if not cut + tail:
                raise WindowError(f"row {i + 1}: its input has no tokens")
            rows.append(head + cut + tail)
        return rows

    def input_room(self, answer_room: int = 1) -> int:
        """Return how many tokens of input fit beside prompt, separator and so long an answer."""
        head, tail = self._frame()
        taken = self._prompt_length + len(head) + len(tail) + answer_room
        room = self.lm.max_positions - taken
        return min(room, self.config.format.max_input_tokens or room)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of an input text."""
        return len(self.lm.tokenize([text])[0])

    @property
    def _prompt_length(self) -> int:
        return self.producer.length if self.producer else 0

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the tokens before and after every input."""
        form = self.config.format
        if not form.chat:
            tail = self.lm.tokenize([form.separator], markup=True)[0] if form.separator else []
            return [], tail
        if not self.lm.tokenizer.chat_template:
            raise LMError(f"{self.lm.name} has no chat template; set format.chat to false")
        mark = "\x00"  # stands where the input goes; no template contains it
        turn = [{"role": "user", "content": mark}]
        framed = self.lm.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        )
        head, _, tail = framed.partition(mark)
        before, after = self.lm.tokenize([head, tail], markup=True)
        return before, after

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Return each answer's token ids, with the LM's end token."""
        ids = self.lm.tokenize([self.config.format.answer_prefix + a for a in answers])
        return [[*row, self.lm.end_ids[0]] for row in ids]

    def generate(
        self,
        texts: Sequence[str],
        decoding: DecodingConfig,
        *,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Generate `decoding.n` answers per text, in batches of similar length.

        Args:
            texts: inputs as they stand in the data (the format is applied here).
            decoding: greedy or sampled, and how long.
            on_rows: called with the number of rows after each batch, for a progress bar.

        Raises:
            WindowError: names the row (from 1) that does not fit.
        """
        ids = self.input_ids(texts)
        results: list[list[Completion]] = [[] for _ in texts]
        most = max(1, BATCH_ROWS // decoding.n)
        batches = length_grouped([len(i) for i in ids], BATCH_TOKENS, most)

        def one(rows: list[int]) -> list[list[Completion]]:
            with torch.no_grad():
                prompt = self.prompt([texts[i] for i in rows])
            return generate(self.lm, prompt, [ids[i] for i in rows], decoding)

        with Streams.of(self.lm, None if len(batches) > 1 else 1) as streams:
            for rows, answers in zip(batches, streams.map(one, batches), strict=True):
                for row, several in zip(rows, answers, strict=True):
                    results[row] = [self.stripped(c) for c in several]
                if on_rows is not None:
                    on_rows(len(rows))
        return results

    def stream(self, text: str, decoding: DecodingConfig) -> Iterator[Delta]:
        """Generate for one text, yielding pieces of text as they become certain."""
        with torch.no_grad():
            prompt = self.prompt([text])
        return stream(self.lm, prompt, self.input_ids([text]), decoding)

    @torch.no_grad()
    def score(
        self,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[list[Score]]:
        """Return the log-likelihood of each text's candidate answers, end token included."""
        candidates = [self.answer_ids(several) for several in answers]
        longest = max((len(c) for row in candidates for c in row), default=1)
        ids = self.input_ids(texts, answer_room=longest)
        results: list[list[Score]] = [[] for _ in texts]
        width = max((len(row) for row in candidates), default=1)
        lengths = [len(i) for i in ids]
        for rows in length_grouped(lengths, BATCH_TOKENS, max(1, BATCH_ROWS // width)):
            prompt = self.prompt([texts[i] for i in rows])
            scored = score(self.lm, prompt, [ids[i] for i in rows], [candidates[i] for i in rows])
            for row, several in zip(rows, scored, strict=True):
                results[row] = several
            if on_rows is not None:
                on_rows(len(rows))
        return results

    def stripped(self, completion: Completion) -> Completion:
        """Take the answer prefix, which is not part of the answer, off a completion's text."""
        completion.text = completion.text.removeprefix(self.config.format.answer_prefix)
        return completion


def mixed_prompt(requests: Sequence[tuple[Skill, str]]) -> Prompt:
    """Return one prompt per request, each by its own skill, for one batch through one LM."""
    if len({id(skill.lm) for skill, _ in requests}) > 1:
        raise ValueError("skills of different LMs cannot share a batch")
    return Prompt.stack([skill.prompt([text]) for skill, text in requests])

"""Textual recursion's first half: a skill proposes answers, which become the next one's input."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shoulders.errors import ShouldersError
from shoulders.lm.decode import Completion, DecodingConfig, Delta
from shoulders.recursion.candidates import (
    Candidate,
    ProposeConfig,
    chosen,
    merged,
    shown,
    subsets,
)

if TYPE_CHECKING:
    from shoulders.skills.skill import Skill

OnRows = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Proposed:
    """What the first passes propose for an input.

    Attributes:
        text: the input with its candidates, as the next pass reads it.
        candidates: the most frequent first; those of the last round.
        left_out: candidates that did not fit the window.
    """

    text: str
    candidates: tuple[Candidate, ...]
    left_out: tuple[Candidate, ...]


class Wanted(NamedTuple):
    """A text that is to be answered by a skill."""

    skill: Skill
    text: str
    decoding: DecodingConfig


Gathering = Generator[list[Wanted], list[list[Completion]], Proposed]
"""Asks for texts to be answered, is sent their answers, and returns what is proposed."""


class Proposals:
    """The passes before a text boundary, and how their samples are shown.

    Args:
        skill: those passes.
        config: how to sample and show.
    """

    def __init__(self, skill: Skill, config: ProposeConfig) -> None:
        self.skill, self.config = skill, config

    def room(self, reader: Skill) -> int:
        """Return the tokens that passes which read candidates have for an input.

        It leaves room for an answer as long as a sample may be, as in training.
        """
        return reader.input_room(self.config.max_new_tokens)

    def gather(self, text: str, reader: Skill, room: int) -> Gathering:
        """Say what is to be answered to propose answers for one text, round after round.

        Args:
            text: the input.
            reader: the passes that read candidates; they answer again in further rounds.
            room: tokens that they have for an input, see `room`.
        """
        config, count = self.config, reader.count_tokens
        (samples,) = yield [Wanted(self.skill, text, config.decoding())]
        candidates = merged(samples)
        for number in range(1, config.rounds):
            if not candidates:
                break
            asked = []
            for sample, picked in enumerate(subsets(text, len(candidates), config, number)):
                part = [candidates[i] for i in picked]
                read = shown(text, part, config, count, room).text
                asked.append(Wanted(reader, read, config.decoding(number, sample)))
            answers = yield asked
            candidates = merged([several[0] for several in answers])
        show = shown(text, candidates, config, count, room)
        return Proposed(show.text, tuple(candidates), show.left_out)

    def propose(
        self, texts: Sequence[str], reader: Skill, *, on_rows: OnRows | None = None
    ) -> list[Proposed]:
        """Propose answers for every text; see `gather`. `on_rows` is told of finished rows.

        A text whose samples all say nothing has no candidates, whatever the others have.
        """
        room = self.room(reader)
        rows = [self.gather(text, reader, room) for text in texts]
        wanted = {i: next(row) for i, row in enumerate(rows)}
        found: dict[int, Proposed] = {}
        while wanted:
            answers = _answered([one for own in wanted.values() for one in own], on_rows)
            for i in list(wanted):
                try:
                    wanted[i] = rows[i].send([next(answers) for _ in wanted[i]])
                except StopIteration as stop:
                    found[i] = stop.value
                    del wanted[i]
        return [found[i] for i in range(len(rows))]

    def answered(
        self,
        texts: Sequence[str],
        reader: Skill,
        decoding: DecodingConfig,
        on_rows: OnRows | None = None,
    ) -> list[list[Completion]]:
        """Return `reader`'s answers to inputs with their candidates, or those a chooser takes.

        A candidate's tokens are not kept; its length and end were those of `propose`.

        Raises `ShouldersError` where several answers are wanted of a chooser, which has one.
        """
        chooser = self.config.chooser
        if chooser != "second_pass" and decoding.n > 1:
            raise ShouldersError(f"chooser {chooser} has one answer: n must be 1")
        found = self.propose(texts, reader)
        if chooser == "second_pass":
            return reader.generate([own.text for own in found], decoding, on_rows=on_rows)
        if on_rows is not None:
            on_rows(len(texts))
        best = [chosen(own.candidates, chooser) for own in found]
        return [[Completion(one.text, [], one.logprob, "stop")] for one in best]

    def streamed(self, text: str, reader: Skill, decoding: DecodingConfig) -> Iterator[Delta]:
        """Yield the pieces of `answered`; what a chooser takes is one."""
        if self.config.chooser == "second_pass":
            return reader.stream(self.propose([text], reader)[0].text, decoding)
        completion = self.answered([text], reader, decoding)[0][0]
        return iter([Delta(0, 0, completion.text, completion)])


def _answered(wanted: Sequence[Wanted], on_rows: OnRows | None) -> Iterator[list[Completion]]:
    """Yield the answers of texts in order; those of one skill and one way are made together."""
    together: dict[tuple[Skill, DecodingConfig], list[int]] = {}
    for place, (skill, _, decoding) in enumerate(wanted):
        together.setdefault((skill, decoding), []).append(place)
    answers: dict[int, list[Completion]] = {}
    for (skill, decoding), places in together.items():
        texts = [wanted[place].text for place in places]
        answers |= zip(places, skill.generate(texts, decoding, on_rows=on_rows), strict=True)
    yield from (answers[place] for place in range(len(wanted)))

"""Textual recursion's first half: a skill proposes answers, which become the next one's input."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shoulders.lm.decode import Completion, DecodingConfig
from shoulders.recursion.candidates import Candidate, ProposeConfig, merged, shown, subsets

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

    def gather(self, text: str, reader: Skill, room: int, row: int = 1) -> Gathering:
        """Say what is to be answered to propose answers for one text, round after round.

        Args:
            text: the input.
            reader: the passes that read candidates; they answer again in further rounds.
            room: tokens that they have for an input.
            row: its number, for errors.

        Raises:
            ShouldersError: no sample says anything.
        """
        config, count = self.config, reader.count_tokens
        (samples,) = yield [Wanted(self.skill, text, config.decoding())]
        candidates = merged(samples, row)
        for number in range(1, config.rounds):
            asked = []
            for chosen in subsets(text, len(candidates), config, number):
                part = [candidates[i] for i in chosen]
                read = shown(text, part, config, count, room).text
                asked.append(Wanted(reader, read, config.decoding(1, number)))
            answers = yield asked
            candidates = merged([several[0] for several in answers], row)
        show = shown(text, candidates, config, count, room)
        return Proposed(show.text, tuple(candidates), show.left_out)

    def propose(
        self, texts: Sequence[str], reader: Skill, *, room: int, on_rows: OnRows | None = None
    ) -> list[Proposed]:
        """Propose answers for every text; see `gather`. `on_rows` is told of finished rows."""
        found: list[Proposed] = []
        rows = [self.gather(text, reader, room, row) for row, text in enumerate(texts, 1)]
        wanted = [next(row) for row in rows]
        while len(found) < len(rows):
            # All rows are in the same round: one skill answers, in one way.
            skill, _, decoding = wanted[0][0]
            every = [one.text for own in wanted for one in own]
            answers = iter(skill.generate(every, decoding, on_rows=on_rows))
            for i, row in enumerate(rows):
                try:
                    wanted[i] = row.send([next(answers) for _ in wanted[i]])
                except StopIteration as stop:
                    found.append(stop.value)
        return found

"""Textual recursion's first half: a skill proposes answers, which become the next one's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoulders.lm.decode import Completion
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


class Proposals:
    """The passes before a text boundary, and how their samples are shown.

    Args:
        skill: those passes.
        config: how to sample and show.
    """

    def __init__(self, skill: Skill, config: ProposeConfig) -> None:
        self.skill, self.config = skill, config

    def propose(
        self, texts: Sequence[str], reader: Skill, *, room: int, on_rows: OnRows | None = None
    ) -> list[Proposed]:
        """Propose answers for every text, over all rounds but the last reading.

        Args:
            texts: inputs.
            reader: the passes that read candidates; they answer again in further rounds.
            room: tokens that they have for an input.
            on_rows: told of finished rows.

        Raises:
            ShouldersError: no sample of a row says anything.
        """
        config = self.config
        samples = self.skill.generate(texts, config.decoding(), on_rows=on_rows)
        candidates = [merged(several, row) for row, several in enumerate(samples, 1)]
        for number in range(1, config.rounds):
            candidates = self._again(texts, candidates, reader, number, room)
        found = []
        for text, own in zip(texts, candidates, strict=True):
            show = shown(text, own, config, reader.count_tokens, room)
            found.append(Proposed(show.text, tuple(own), show.left_out))
        return found

    def _again(
        self,
        texts: Sequence[str],
        candidates: Sequence[Sequence[Candidate]],
        reader: Skill,
        number: int,
        room: int,
    ) -> list[list[Candidate]]:
        """Let the reader answer `n` times, each time from a subset of the candidates."""
        config = self.config
        asked: list[str] = []
        for text, own in zip(texts, candidates, strict=True):
            for chosen in subsets(text, len(own), config, number):
                part = [own[i] for i in chosen]
                asked.append(shown(text, part, config, reader.count_tokens, room).text)
        answers = reader.generate(asked, config.decoding(1, number))
        n = config.n
        grouped: list[list[Completion]] = [
            [several[0] for several in answers[i : i + n]] for i in range(0, len(answers), n)
        ]
        return [merged(several, row) for row, several in enumerate(grouped, 1)]

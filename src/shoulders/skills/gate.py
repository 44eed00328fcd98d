"""Recurse only where it pays: one pass answers, and its calibrated probability decides.

What answers at once is the first pass of textual recursion, greedily, or the last pass of neural
recursion reading the LM's own embeddings. How likely that answer is right is a logistic model of
its mean log-probability per token, fitted on validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoulders.errors import ShouldersError, TrainingError
from shoulders.lm.decode import Completion, DecodingConfig
from shoulders.lm.score import Score
from shoulders.reader.calibration import Platt, fit_platt
from shoulders.skills.parts import Parts
from shoulders.skills.skill import Skill


def direct(skill: Skill) -> Skill:
    """Return the one pass of a recursive skill that answers at once; raises for other skills."""
    if skill.proposals is not None:
        return skill.proposals.skill
    if not skill.parts.earlier:
        raise ShouldersError("the skill has one pass: there is nothing to decide")
    return Skill(skill.lm, skill.config, Parts((), skill.parts.producer, skill.trained))


def confidence(completion: Completion) -> float:
    """Return what the gate looks at: the mean log-probability of an answer's tokens."""
    return completion.logprob / max(1, len(completion.token_ids))


def fitted_gate(completions: Sequence[Completion], right: Sequence[bool]) -> Platt | None:
    """Fit the gate to direct answers; None where they cannot tell right from wrong."""
    try:
        return fit_platt([confidence(c) for c in completions], list(right))
    except TrainingError:
        return None


class Gated:
    """A recursive skill that answers at once where that is likely right.

    Args:
        skill: with two passes or more.
        gate: from confidence to probability, see `fitted_gate`.
        recurse_below: answers less likely right than this are given again by all passes. 0 never
            recurses, 1 always does.

    Attributes:
        answered, recursed: rows so far, and those of them that all passes answered.
    """

    def __init__(self, skill: Skill, gate: Platt, recurse_below: float) -> None:
        self.skill = skill
        self._direct, self._gate, self._least = direct(skill), gate, recurse_below
        self.answered = self.recursed = 0

    def generate(
        self,
        texts: Sequence[str],
        decoding: DecodingConfig,
        *,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Generate as `Skill.generate` does."""
        answers = self._direct.generate(texts, decoding)
        sure = [self._gate.probability(confidence(several[0])) for several in answers]
        again = [i for i, p in enumerate(sure) if p < self._least or self._least >= 1]
        if again:
            better = self.skill.generate([texts[i] for i in again], decoding)
            for i, several in zip(again, better, strict=True):
                answers[i] = several
        self.answered += len(texts)
        self.recursed += len(again)
        if on_rows is not None:
            on_rows(len(texts))
        return answers

    def score(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Score]]:
        """Score as `Skill.score` does, through all passes."""
        return self.skill.score(texts, answers)

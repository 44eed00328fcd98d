"""How sure a reader may be: a logistic model of its answers on validation questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoulders.evaluation.metrics import exact_match, normalize_squad
from shoulders.reader.questions import Question
from shoulders.skills.reader import Answer, Confidence

FEWEST = 20  # questions, and right and wrong answers among them at least this many / 4


def fitted_confidence(
    questions: Sequence[Question], answers: Sequence[Answer]
) -> Confidence | None:
    """Fit `P(the answer is right)` to the reader's own answers; None with too few to fit to.

    Logistic regression (Platt 1999) on the two figures of `Confidence`, standardised inside, with
    scikit-learn's default penalty.

    Args:
        questions: not trained on, with answers.
        answers: the reader's, as many.
    """
    right = np.array(
        [
            exact_match(answer.proposed, question.answers, normalize_squad)
            for question, answer in zip(questions, answers, strict=True)
        ]
    )
    if len(right) < FEWEST or min(right.sum(), (1 - right).sum()) < FEWEST / 4:
        return None
    from sklearn.linear_model import LogisticRegression

    figures = np.array([(answer.logprob, answer.best) for answer in answers])
    centre, spread = figures.mean(0), figures.std(0)
    spread[spread == 0] = 1.0
    model = LogisticRegression().fit((figures - centre) / spread, right)
    weights = model.coef_[0] / spread
    return Confidence(
        bias=float(model.intercept_[0] - weights @ centre),
        answer=float(weights[0]),
        passage=float(weights[1]),
    )

"""Equal tuning effort: the same small, seeded search over learning rates for every method."""

from __future__ import annotations

import math
from collections.abc import Callable

from shoulders.comparison.ledger import Ledger
from shoulders.comparison.methods import Method
from shoulders.comparison.parts import SearchConfig
from shoulders.errors import DivergedError, ShouldersError, install


def best_factor(
    method: Method, config: SearchConfig, ledger: Ledger, attempt: Callable[[int, float], float]
) -> float:
    """Return what a method's rates are multiplied by: the best of its trials on validation loss.

    The first trial is 1, the method's own rates, the next two lie half-way to `widest` on either
    side (so few random draws may all fall together); the others are optuna's (TPE, seed 0).
    Finished trials are read from the ledger, and told to the search as if they had just been made.

    Args:
        method: whose rates.
        config: how many trials, how wide.
        ledger: keeps them.
        attempt: trains trial number i at a factor, and returns the loss on validation rows.

    Raises:
        ShouldersError: every trial diverged.
    """
    if config.trials == 0:
        return 1.0
    try:
        import optuna
    except ImportError:
        raise ShouldersError(f"search.trials needs optuna; {install('compare')}") from None

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    half = math.sqrt(config.widest)
    for factor in (1.0, half, 1 / half):
        study.enqueue_trial({"factor": factor})
    for number in range(config.trials):
        trial = study.ask()
        factor = trial.suggest_float("factor", 1 / config.widest, config.widest, log=True)
        row = ledger.find(stage="trial", method=method.name, number=number)
        if row is None:
            try:
                loss: float | None = attempt(number, factor)
            except DivergedError:  # as bad as can be, and known from now on
                loss = None
            row = {"stage": "trial", "method": method.name, "number": number}
            row = ledger.add({**row, "factor": factor, "loss": loss})
        if row["loss"] is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, row["loss"])
    tried = ledger.every(stage="trial", method=method.name)
    good = [row for row in tried if row["loss"] is not None and math.isfinite(row["loss"])]
    if not good:
        raise ShouldersError(f"{method.name}: every trial of the search diverged")
    return float(min(good, key=lambda row: row["loss"])["factor"])

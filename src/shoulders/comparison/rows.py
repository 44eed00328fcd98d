"""The rows of a comparison: what every method is trained, selected and measured on."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from shoulders.comparison.plan import Plan
from shoulders.data.rows import Row, as_line
from shoulders.data.templates import Templates
from shoulders.errors import DataError
from shoulders.training.run import load_data, read_all, unseen_rows
from shoulders.training.validation import choose_rows


@dataclass(frozen=True)
class Rows:
    """What every method is trained, selected and measured on.

    Attributes:
        train: drawn from in the mixture's order.
        validation: rows that select; none of them is in `train`.
        test: measured once.
        templates: how rows become text.
        seen: test rows that were left out, since they are trained on.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    templates: Templates
    seen: int = 0


def rows_of(plan: Plan) -> Rows:
    """Return a plan's rows; raises `DataError` where training rows stand in the test as well."""
    train, validation, templates = load_data(plan.data)
    test = read_all(plan.test)
    if plan.test_rows is not None:
        test = choose_rows(test, plan.test_rows)
    unseen = unseen_rows(test, train)
    if len(unseen) < len(test) / 2:
        raise DataError(f"{plan.test[0]}: most of its rows are trained on; give other test rows")
    # Rates are searched on validation rows: those of the test are not to be among them.
    validation = choose_rows(unseen_rows(validation, [*train, *test]), plan.validation_rows)
    if not validation:
        raise DataError("data.validation: all of its rows are trained or tested on; give others")
    return Rows(train, validation, unseen, templates, len(test) - len(unseen))


def tasks_of(rows: Rows) -> list[tuple[str, int]]:
    """Return the tasks of the test rows in order, each with how many rows of it follow."""
    return [
        (task, len(list(own))) for task, own in itertools.groupby(row.task for row in rows.test)
    ]


def digest_of(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of rows in their order."""
    return hashlib.sha256("".join(map(as_line, rows)).encode("utf-8", "surrogatepass")).hexdigest()

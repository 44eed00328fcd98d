"""What the stages of a comparison share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from shoulders.comparison.forgetting import examined, text_of
from shoulders.comparison.frozen import Frozen
from shoulders.comparison.ledger import Ledger
from shoulders.comparison.methods import Method
from shoulders.comparison.plan import Plan
from shoulders.comparison.rows import Rows
from shoulders.comparison.tuned import Tuned
from shoulders.data.rows import Row
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.training.run import read_all


@dataclass(frozen=True)
class Setting:
    """One LM, the rows, the methods, and where what is done is noted.

    Attributes:
        plan: what is compared.
        lm: the frozen LM, one copy for all.
        rows: what every method is trained, selected and measured on.
        methods: in the plan's order.
        ledger: finished runs.
        frozen: trains and opens the frozen methods.
        tuned: trains and opens the rivals.
        console: for progress.
    """

    plan: Plan
    lm: FrozenLM
    rows: Rows
    methods: Sequence[Method]
    ledger: Ledger
    frozen: Frozen
    tuned: Tuned
    console: Console

    @property
    def trained(self) -> list[Method]:
        """The methods that learn from rows."""
        return [method for method in self.methods if method.trained]

    @property
    def decoding(self) -> DecodingConfig:
        """How answers to test rows are decoded: greedily."""
        return DecodingConfig(max_new_tokens=self.plan.max_new_tokens)

    @functools.cached_property
    def texts(self) -> list[str]:
        """The test rows' texts, as all but few-shot are asked them."""
        return [self.rows.templates.render(row, 0) for row in self.rows.test]

    def examine(self, lm: FrozenLM) -> dict[str, Any]:
        """Return what an LM still knows, see `shoulders.comparison.forgetting`."""
        return examined(lm, self.plan.forgetting, self.text, self._others)

    @functools.cached_property
    def text(self) -> list[str]:
        """The files whose perplexity is measured; what the LM writes itself, where none is given.

        To be asked for while the LM is what it was.
        """
        return text_of(self.lm, self.plan.forgetting, self.ledger.out)

    @functools.cached_property
    def _others(self) -> list[Row]:
        return read_all(self.plan.forgetting.rows)

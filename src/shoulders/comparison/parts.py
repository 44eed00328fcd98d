"""The parts of a comparison's plan: budget, search, forgetting, methods of one's own, variants."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoulders.skills.config import SkillConfig, TextFormat
from shoulders.training.configs import OptimizerConfig
from shoulders.training.keys import explain


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetConfig(_Part):
    """What every method gets: the same number of training examples.

    Attributes:
        examples: that number, counted with repetition; or
        minutes: for everything, so that the number follows from what a step of each method takes
            on this machine.
        parameters: trained ones that the methods named `*_matched` are given, as nearly as their
            length or rank allows; those of `idpt_kv` where it is not said.
    """

    examples: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    parameters: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.examples is None) == (self.minutes is None):
            raise ValueError("give either examples or minutes")
        return self


class SearchConfig(_Part):
    """Tuning effort, equal for all methods: learning rates tried on validation rows.

    Attributes:
        trials: runs per trained method; 0 takes each method's default rates.
        share: of the budget's examples that a trial trains on.
        widest: rates are multiplied by 1/widest to widest (on a log scale; the first by 1).
    """

    trials: int = Field(default=0, ge=0)
    share: float = Field(default=0.25, gt=0, le=1)
    widest: float = Field(default=4.0, gt=1, allow_inf_nan=False)


class ForgettingConfig(_Part):
    """What tuned LMs are examined on for forgetting.

    Attributes:
        text: UTF-8 files whose perplexity is measured; without any, what the LM itself writes.
        chunk: tokens that are read at once.
        chunks: how many, spread over the files.
        rows: rows of other tasks, for zero-shot scores before and after.
    """

    text: list[str] = []
    chunk: int = Field(default=128, ge=2)
    chunks: int = Field(default=64, ge=1)
    rows: list[str] = []


class OwnMethod(_Part):
    """A method of the user's own: passes and format as in a recipe, and their learning rates."""

    passes: list[dict[str, Any]] = Field(min_length=1)
    format: TextFormat = TextFormat()
    optimizer: OptimizerConfig

    @model_validator(mode="after")
    def _as_in_a_recipe(self) -> Self:
        values = {"passes": self.passes, "format": self.format.model_dump()}
        try:
            SkillConfig.model_validate(values)
        except ValidationError as error:
            raise ValueError(explain(error, SkillConfig, values)) from None
        return self


class Variant(_Part):
    """A method once more, with other examples than the budget's, or read in another format.

    Attributes:
        of: that method.
        share: of the budget's examples, the first ones.
        epochs: how often it reads them.
        optimizer: its rates where they are not that method's: a longer training likes lower ones.
            Of a tuned method `lr` alone.
        format: how it reads rows, where not as that method does; of frozen and tuned methods.
        members: so many of a frozen method, from other seeds, that answer together
            (`shoulders.skills.ensemble`).
    """

    of: str
    share: float = Field(default=1.0, gt=0, le=1)
    epochs: int = Field(default=1, ge=1)
    optimizer: OptimizerConfig | None = None
    format: TextFormat | None = None
    members: int = Field(default=1, ge=1)

"""The plan of a comparison: which LM, rows, methods, budget and effort; read from YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoulders.comparison.parts import (
    BudgetConfig,
    ForgettingConfig,
    OwnMethod,
    SearchConfig,
    Variant,
)
from shoulders.data.mixture import MixtureConfig
from shoulders.errors import RecipeError, nearest
from shoulders.skills.config import TextFormat
from shoulders.training.configs import LMConfig, OptimizerConfig
from shoulders.training.keys import explain
from shoulders.training.recipe import located, read_values

BARE = ("zero_shot", "few_shot")
FROZEN = ("static", "static_kv", "static_lowrank", "static_lora", "idpt", "idspam", "idpt_kv",
          "idpt_lowrank", "static_kv_matched", "static_lowrank_matched",
          "idpt_kv_small", "textual", "neural")  # fmt: skip
TUNED = ("lora_r4", "lora_r16", "lora_r64", "lora_matched", "full")
# A prompt of vectors learns too slowly for a small budget to be among them.
DEFAULT = (*BARE, "static_kv", "static_lowrank", "idpt_kv", "idpt_lowrank", "lora_r16", "full")


class Plan(BaseModel):
    """A comparison.

    Attributes:
        lm: the LM, frozen or tuned.
        data: rows to train and to select on.
        test: files that everything is measured on, once, at the end.
        test_rows: of every task, at most; chosen by a hash of their content.
        validation_rows: of every task that selects, likewise.
        methods: by name; see `shoulders.comparison.methods`.
        own: further methods.
        variants: methods with a share of the examples, that read them several times, in another
            format, or as an ensemble.
        ensembles: methods whose finished skills of the same seed answer together; none of them is
            trained again. They must stand before it in `methods`.
        budget: training examples, or minutes.
        rows_per_step: examples in an optimizer step.
        length: positions of a prompt.
        start: text whose embeddings prompts begin as.
        shots: worked examples of few-shot.
        max_new_tokens: longest answer.
        seeds: every method is trained with each.
        search: tuning effort.
        forgetting: what else is measured of tuned LMs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm: LMConfig = LMConfig()
    data: MixtureConfig
    test: list[str] = Field(min_length=1)
    test_rows: int | None = Field(default=None, ge=1)
    validation_rows: int = Field(default=8, ge=1)
    methods: tuple[str, ...] = Field(default=DEFAULT, min_length=1)
    own: dict[str, OwnMethod] = {}
    variants: dict[str, Variant] = {}
    ensembles: dict[str, Annotated[tuple[str, ...], Field(min_length=2)]] = {}
    budget: BudgetConfig
    rows_per_step: int = Field(default=8, ge=1)
    length: int = Field(default=10, ge=1)
    start: str = "Read the instruction and give only the short answer."
    shots: int = Field(default=4, ge=1)
    max_new_tokens: int = Field(default=32, ge=1)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**61)], ...] = Field(default=(0,), min_length=1)
    search: SearchConfig = SearchConfig()
    forgetting: ForgettingConfig = ForgettingConfig()

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        built_in = (*BARE, *FROZEN, *TUNED)
        for name in (*self.own, *self.variants, *self.ensembles):
            if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
                raise ValueError(f"'{name}': a method's name is a folder's; leave out / and \\")
        taken = [f"own.{name}" for name in self.own if name in built_in]
        taken += [f"variants.{n}" for n in self.variants if n in built_in or n in self.own]
        others = (*built_in, *self.own, *self.variants)
        taken += [f"ensembles.{n}" for n in self.ensembles if n in others]
        if taken:
            raise ValueError(f"{taken[0]}: that is the name of a method that is there already")
        return self

    @model_validator(mode="after")
    def _variants_known(self) -> Self:
        known = (*BARE, *FROZEN, *TUNED, *self.own)
        for name, variant in self.variants.items():
            if variant.of not in known:
                raise ValueError(
                    f"variants.{name}.of: no method '{variant.of}'{nearest(variant.of, known)}"
                )
            if variant.of in (*BARE, "textual") or _proposes(self.own.get(variant.of)):
                raise ValueError(
                    f"variants.{name}.of: '{variant.of}' does not read the budget's examples in "
                    "order, so it has no variants"
                )
            rates = variant.optimizer
            if variant.of in TUNED and rates and rates != OptimizerConfig(lr=rates.lr):
                raise ValueError(
                    f"variants.{name}.optimizer: '{variant.of}' is tuned at one rate: give lr alone"
                )
            if variant.members > 1 and not self._of_one_pass(variant.of):
                raise ValueError(
                    f"variants.{name}.members: an ensemble is of a frozen method of one pass, "
                    f"which '{variant.of}' is not"
                )
        return self

    @model_validator(mode="after")
    def _ensembles_known(self) -> Self:
        known = (*BARE, *FROZEN, *TUNED, *self.own, *self.variants)
        for name, members in self.ensembles.items():
            for other in members:
                if other not in known:
                    raise ValueError(
                        f"ensembles.{name}: no method '{other}'{nearest(other, known)}"
                    )
                of = self.variants[other].of if other in self.variants else other
                if not self._of_one_pass(of):
                    raise ValueError(
                        f"ensembles.{name}: members are frozen methods of one pass; "
                        f"'{other}' is none"
                    )
            if len(set(members)) < len(members):
                raise ValueError(f"ensembles.{name}: each method may stand there once")
            if len({self._format(other).answer_prefix for other in members}) > 1:
                raise ValueError(
                    f"ensembles.{name}: members begin answers alike (format.answer_prefix)"
                )
        return self

    @model_validator(mode="after")
    def _methods_known(self) -> Self:
        known = (*BARE, *FROZEN, *TUNED, *self.own, *self.variants, *self.ensembles)
        for name in self.methods:
            if name not in known:
                raise ValueError(f"methods: no method '{name}'{nearest(name, known)}")
        if len(set(self.methods)) < len(self.methods) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("methods and seeds: each may stand there once")
        return self

    @model_validator(mode="after")
    def _rows_apart(self) -> Self:
        if not self.data.validation:
            raise ValueError("data.validation: needed, to select on; never the test rows")
        if both := sorted(set(self.test) & {*self.data.train, *self.data.validation}):
            raise ValueError(f"test: '{both[0]}' is trained or selected on as well")
        return self

    def _format(self, name: str) -> TextFormat:
        variant = self.variants.get(name)
        if variant is not None and variant.format is not None:
            return variant.format
        own = self.own.get(variant.of if variant is not None else name)
        return own.format if own is not None else TextFormat()

    def _of_one_pass(self, name: str) -> bool:
        own = self.own.get(name)
        several = (*BARE, *TUNED, "neural", "textual")
        return len(own.passes) == 1 if own else name not in several

    @property
    def files(self) -> list[str]:
        """Files and folders that it reads."""
        templates = [self.data.templates] if self.data.templates else []
        other = (*self.test, *self.forgetting.text, *self.forgetting.rows)
        return [*self.data.train, *self.data.validation, *templates, *other]

    @property
    def libraries(self) -> list[str]:
        """What it needs beside the library itself: for its report, rivals and search."""
        plain = {self.variants[n].of if n in self.variants else n for n in self.methods}
        tuned = plain & set(TUNED)
        wanted = {"matplotlib": True, "accelerate": bool(tuned), "peft": bool(tuned - {"full"}),
                  "optuna": self.search.trials > 0}  # fmt: skip
        return [name for name, needed in wanted.items() if needed]

    def steps(self, share: float = 1.0, epochs: int = 1) -> int:
        """Optimizer steps to read a share of the budget's examples so many times.

        The budget must be in examples.
        """
        assert self.budget.examples is not None
        return max(1, int(self.budget.examples * share) // self.rows_per_step) * epochs


def _proposes(own: OwnMethod | None) -> bool:
    return own is not None and any(one.get("propose") for one in own.passes)


def read_plan(path: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """Read a plan; files that it names lie beside it, or where they say.

    Raises:
        RecipeError: names the file and the key.
    """
    path = Path(path)
    values = read_values(path, overrides)
    plan = make_plan(values, str(path))

    def found(names: Sequence[str]) -> list[str]:
        return [located(name, path.parent) for name in names]

    data = plan.data.model_copy(
        update={
            "train": found(plan.data.train),
            "validation": found(plan.data.validation),
            "templates": found([plan.data.templates])[0] if plan.data.templates else None,
        }
    )
    other = {"text": found(plan.forgetting.text), "rows": found(plan.forgetting.rows)}
    forgetting = plan.forgetting.model_copy(update=other)
    return plan.model_copy(
        update={"data": data, "test": found(plan.test), "forgetting": forgetting}
    )


def make_plan(values: dict[str, Any], where: str = "plan") -> Plan:
    """Validate a plan given as nested mappings; raises `RecipeError` naming `where`."""
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, Plan, values)}") from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error

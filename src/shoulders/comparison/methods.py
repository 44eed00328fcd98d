"""The methods of a comparison: what each trains, and at which rates it begins its search."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from shoulders.comparison.parts import Variant
from shoulders.comparison.plan import BARE, TUNED, Plan
from shoulders.data.mixture import MixtureConfig
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.encoders.load import load_encoder
from shoulders.lm.frozen import FrozenLM
from shoulders.prompts.build import rates_of
from shoulders.skills.config import SkillConfig, TextFormat
from shoulders.skills.skill import Skill

Family = Literal["bare", "frozen", "tuned"]
SMALL = {"width": 24, "layers": 1, "heads": 2}
CONNECTOR = {"kind": "connector", "layers": 2, "width": 384, "heads": 6}
PROPOSE = {"n": 8, "temperature": 0.8, "max_new_tokens": 24}
# Where searches begin: each producer's own rates, and PEFT's own examples.
LORA_RATE, FULL_RATE = 5e-4, 1e-4


@dataclass(frozen=True)
class Method:
    """One way to make the LM do a job.

    Attributes:
        name: as in the plan.
        family: the LM alone, networks around the frozen LM, or a tuned copy of it.
        passes: of a frozen method, as in a recipe.
        optimizer: its rates before the search.
        start: parts that begin at those of another method's skill of the same seed.
        rank: of LoRA; None tunes every weight.
        share: of the budget's examples that it learns from.
        epochs: how often it reads them.
        format: how rows become its tokens.
        members: skills that answer together, each trained alone; 1 for no ensemble.
        joins: methods whose skills it is the ensemble of; nothing is trained for it.
        drawn: the seed whose examples it reads, where that is not its own: of a member.
    """

    name: str
    family: Family
    passes: Sequence[dict[str, Any]] = ()
    optimizer: dict[str, Any] = field(default_factory=dict)
    start: dict[str, str] = field(default_factory=dict)
    rank: int | None = None
    share: float = 1.0
    epochs: int = 1
    format: TextFormat = field(default_factory=TextFormat)
    members: int = 1
    joins: tuple[str, ...] = ()
    drawn: int | None = None

    def steps(self, plan: Plan) -> int:
        """Optimizer steps of a whole run, of each member; the plan's budget must be in examples."""
        return plan.steps(self.share, self.epochs)

    def data(self, plan: Plan, steps: int) -> MixtureConfig:
        """Return the rows that a run of so many steps reads, once or as often as it should."""
        if self.epochs == 1 and self.drawn is None:
            return plan.data
        examples = max(1, steps // self.epochs) * plan.rows_per_step
        examples = min(plan.data.examples or examples, examples)
        seed = self.drawn if plan.data.seed is None else plan.data.seed
        return plan.data.model_copy(update={"examples": examples, "seed": seed})

    @property
    def trained(self) -> bool:
        """Whether it learns from rows at all."""
        return self.family != "bare"

    @property
    def proposes(self) -> bool:
        """Whether text stands between its passes, so that it needs cross-fitting."""
        return any(one.get("propose") for one in self.passes)


def methods_of(plan: Plan, lm: FrozenLM) -> list[Method]:
    """Return the methods of a plan in its order; matched ones are given their size here.

    `static_kv_matched` is as long, and `static_lowrank_matched` and `lora_matched` are of the rank,
    that comes nearest to `budget.parameters`, or the trained parameters of `idpt_kv`.
    """
    encoder = functools.cache(load_encoder)
    found = []
    for name in plan.methods:
        if name in plan.ensembles:
            found.append(_joined(name, plan))
            continue
        variant = plan.variants.get(name)
        if variant is None:
            found.append(_method(name, plan, lm, encoder))
            continue
        same = _method(variant.of, plan, lm, encoder)
        rated = variant.optimizer.model_dump() if variant.optimizer else same.optimizer
        changed = replace(same, name=name, share=variant.share, epochs=variant.epochs)
        form = variant.format or same.format
        found.append(replace(changed, optimizer=rated, format=form, members=variant.members))
    return found


def _joined(name: str, plan: Plan) -> Method:
    """Return the ensemble of other methods; its examples are those of the one that reads most."""
    joins = plan.ensembles[name]
    own = [plan.variants.get(one) or Variant(of=one) for one in joins]
    most = max(own, key=lambda one: one.share * one.epochs)
    members = sum(one.members for one in own)
    return Method(
        name, "frozen", share=most.share, epochs=most.epochs, members=members, joins=joins
    )


def _method(name: str, plan: Plan, lm: FrozenLM, encoder: Callable[[str], FrozenEncoder]) -> Method:
    if name in BARE:
        return Method(name, "bare")
    if name in plan.own:
        own = plan.own[name]
        rated = own.optimizer.model_dump()
        return Method(name, "frozen", own.passes, rated, format=own.format)
    if name in TUNED:
        if name == "full":
            return Method(name, "tuned", optimizer={"lr": FULL_RATE})
        matched = name == "lora_matched"
        rank = _matching_rank(plan, lm, encoder) if matched else int(name.removeprefix("lora_r"))
        return Method(name, "tuned", optimizer={"lr": LORA_RATE}, rank=rank)
    written = prompt("idpt_kv", plan)
    static = prompt("static_kv", plan)
    if name == "textual":
        both = [{"prompt": written, "propose": PROPOSE}, {"prompt": written}]
        gentle = {"lr": 3e-3, "lr_for": {"generator": 3e-4, "project": 5e-5}}
        parts = ("passes.0.prompt", "passes.1.prompt")
        return Method(name, "frozen", both, gentle, dict.fromkeys(parts, "idpt_kv"))
    if name == "neural":
        linked = {**rates("static_kv"), "lr_for": {"passes.0.link": 5e-4}}
        return Method(name, "frozen", [{"link": CONNECTOR}, {"prompt": static}], linked)
    kind, settings = name, dict[str, Any]()
    if name == "static_kv_matched":
        kind, settings = "static_kv", {"length": _matching_length(plan, lm, encoder)}
    elif name == "static_lowrank_matched":
        kind, settings = "static_lowrank", {"rank": _matching_updates(plan, lm, encoder)}
    elif name == "idpt_kv_small":
        kind, settings = "idpt_kv", {"generator": SMALL}
    return Method(name, "frozen", [{"prompt": prompt(kind, plan, **settings)}], rates(kind))


def rates(kind: str) -> dict[str, Any]:
    """Return the learning rates that training a kind of producer begins with."""
    found = rates_of(kind)
    assert found is not None  # this package's kinds have them
    return found


def prompt(kind: str, plan: Plan, **settings: Any) -> dict[str, Any]:
    """Return a producer's settings as in a recipe."""
    init = {"source": "text", "text": plan.start}
    return {"kind": kind, "length": plan.length, "init": init, **settings}


def parameters(
    passes: Sequence[dict[str, Any]], lm: FrozenLM, encoder: Callable[[str], FrozenEncoder]
) -> int:
    """Return how many parameters a frozen method trains."""
    config = SkillConfig.model_validate({"passes": list(passes)})
    return Skill.create(lm, config, encoder).trained_parameters


def _wanted(plan: Plan, lm: FrozenLM, encoder: Callable[[str], FrozenEncoder]) -> int:
    """Return how many parameters the matched methods are to have."""
    if plan.budget.parameters is not None:
        return plan.budget.parameters
    return parameters([{"prompt": prompt("idpt_kv", plan)}], lm, encoder)


def _matching_length(plan: Plan, lm: FrozenLM, encoder: Callable[[str], FrozenEncoder]) -> int:
    """Return how long a static prefix must be to have as many parameters as `idpt_kv`."""
    wanted = _wanted(plan, lm, encoder)
    here = parameters([{"prompt": prompt("static_kv", plan)}], lm, encoder)
    return max(1, round(wanted * plan.length / here))


def _matching_updates(plan: Plan, lm: FrozenLM, encoder: Callable[[str], FrozenEncoder]) -> int:
    """Return the rank at which a static prefix with updates has as many parameters as `idpt_kv`."""
    wanted = _wanted(plan, lm, encoder)
    prefix = parameters([{"prompt": prompt("static_kv", plan)}], lm, encoder)
    return max(1, round((wanted - prefix) / (2 * lm.layers * lm.hidden_size)))


def _matching_rank(plan: Plan, lm: FrozenLM, encoder: Callable[[str], FrozenEncoder]) -> int:
    """Return the rank at which LoRA on all layers' products trains as many as `idpt_kv`."""
    wanted = _wanted(plan, lm, encoder)
    with torch.device("meta"):  # shapes only: here the LM itself may be quantised or fused
        plain = type(lm.model)(lm.model.config)
    tied = plain.get_output_embeddings()
    shapes = [m.weight.shape for m in plain.modules() if isinstance(m, nn.Linear) and m is not tied]
    return max(1, round(wanted / sum(sum(shape) for shape in shapes)))

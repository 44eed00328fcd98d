"""The stages of a comparison between its beginning and its end, each of which can be stopped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoulders.comparison.bare import bare
from shoulders.comparison.frozen import Trained
from shoulders.comparison.ledger import Ledger
from shoulders.comparison.measure import interference, latencies, measured, once
from shoulders.comparison.methods import Method
from shoulders.comparison.plan import Plan
from shoulders.comparison.search import best_factor
from shoulders.comparison.setting import Setting
from shoulders.comparison.tuned import plain
from shoulders.errors import ShouldersError, placed
from shoulders.skills.config import TextFormat
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.framing import Framing
from shoulders.skills.skill import Skill


def ask_untrained(setting: Setting) -> None:
    """Ask the LM alone, without and with worked examples; examine it before anything is tuned."""
    for method in setting.methods:
        if method.family == "bare" and not setting.ledger.find(stage="run", method=method.name):
            skill, asked = bare(method, setting.lm, setting.plan, setting.rows)
            measured(setting, method, 0, skill, asked, {})
    rivals = any(method.family == "tuned" for method in setting.methods)

    # In the precision of rivals' copies: again, where they join a comparison that had none.
    read = "float32" if rivals else setting.lm.quantize or setting.lm.precision
    key = {"stage": "forgetting", "method": "frozen", "seed": 0}
    noted = setting.ledger.find(**key)
    if noted is None or (rivals and noted.get("read", read) != read):
        lm = setting.tuned.original(setting.lm) if rivals else setting.lm
        setting.ledger.replace({**key, "read": read, **setting.examine(lm)}, key)


def check_windows(setting: Setting) -> None:
    """Raise `WindowError`, naming file and line, for a test row that is too long for the LM.

    Now, not when hours of training are over. Counted is the longest prompt of a pass that reads
    the text, since what a prompt takes of the window is not the text's.
    """
    longest: dict[TextFormat, int] = {}
    for method in setting.trained:
        lengths = [int((one.get("prompt") or {}).get("length", 0)) for one in method.passes]
        longest[method.format] = max([longest.get(method.format, 0), *lengths])
    places = [row.where or "" for row in setting.rows.test]
    with placed(setting.texts, places):
        for form, length in longest.items():
            framing = Framing(setting.lm, form, length)
            framing.input_ids(setting.texts, framing.answer_room(setting.decoding.max_new_tokens))


def search_rates(setting: Setting, method: Method) -> float:
    """Return what a method's rates are multiplied by: the best of a few short runs, see `search`.

    An ensemble's are searched with one member: no more effort than for others.
    """
    if method.joins:
        return 1.0
    one, plan = replace(method, members=1), setting.plan

    def attempt(number: int, factor: float) -> float:
        folder = setting.ledger.folder(one.name, number, "trials")
        steps = max(1, round(one.steps(plan) * plan.search.share))
        settings: dict[str, Any] = {"steps": steps, "seed": 0, "factor": factor}
        if one.family == "tuned":
            return setting.tuned.train(one, folder, keep=False, **settings).loss
        begun = starts(one, setting.ledger, plan.seeds[0])
        return setting.frozen.train(one, folder, start=begun, **settings).loss

    return best_factor(method, plan.search, setting.ledger, attempt)


def train_and_ask(setting: Setting, method: Method, seed: int, factor: float) -> None:
    """Train a method with one seed, and ask what comes of it the test rows."""
    steps = method.steps(setting.plan)
    said = f"of {', '.join(method.joins)}" if method.joins else f"{steps} steps"
    setting.console.print(f"[bold]{method.name}[/], seed {seed}: {said}")
    folder = setting.ledger.folder(method.name, seed)
    settings: dict[str, Any] = {"steps": steps, "seed": seed, "factor": factor}
    if method.family == "frozen":
        begun = starts(method, setting.ledger, seed)
        if method.joins:
            done = setting.frozen.join(folder, begun)
        else:
            done = setting.frozen.train(method, folder, start=begun, **settings)
        skill = setting.frozen.skill(folder)
        facts = _facts(method, setting.plan, factor, done, skill.trained_parameters)
        measured(setting, method, seed, skill, setting.texts, facts)
        return
    done = setting.tuned.train(method, folder, keep=True, **settings)
    sizes = setting.tuned.trained_parameters(folder)
    facts = _facts(method, setting.plan, factor, done, sizes)
    with setting.tuned.skill(method, folder) as skill:
        once(setting.ledger, "forgetting", method.name, seed, lambda: setting.examine(skill.lm))
        measured(setting, method, seed, skill, setting.texts, facts)


def time_answers(setting: Setting) -> None:
    """Time what an answer takes, of all methods by turns.

    Merged, a tuned LM is as fast as the LM itself in the plan's precision.
    """
    ledger = setting.ledger
    if all(ledger.find(stage="latency", method=method.name) for method in setting.methods):
        return
    asked: list[tuple[Skill | Ensemble, list[str]]] = []
    for method in setting.methods:
        if method.family == "bare":
            asked.append(bare(method, setting.lm, setting.plan, setting.rows))
        elif method.family == "tuned":
            asked.append((plain(setting.lm, method), setting.texts))
        else:
            done = {run["seed"] for run in ledger.every(stage="run", method=method.name)}
            seed = next(seed for seed in setting.plan.seeds if seed in done)
            folder = ledger.folder(method.name, seed)
            asked.append((setting.frozen.skill(folder, remembers=False), setting.texts))
    for method, ms in zip(setting.methods, latencies(asked, setting.console), strict=True):
        ledger.add({"stage": "latency", "method": method.name, "ms": ms})


def ask_first_again(setting: Setting) -> None:
    """Ask the skill that was trained first again: no other has changed it, as is measured here."""
    first = next((method for method in setting.trained if method.family == "frozen"), None)
    if first is not None:
        ledger, runs = setting.ledger, len(setting.ledger.every(stage="run"))
        key = {"stage": "interference", "method": first.name, "seed": setting.plan.seeds[0]}
        noted = ledger.find(**key)
        if noted is None or noted.get("runs", runs) < runs:  # others have been trained since
            ledger.replace({**key, "runs": runs, **interference(setting, first)}, key)


def unfinished(plan: Plan, methods: Sequence[Method], ledger: Ledger) -> list[dict[str, Any]]:
    """Return the runs that a plan names and that are not finished, by `method` and `seed`."""
    named = [(m.name, seed) for m in methods for seed in (plan.seeds if m.trained else (0,))]
    return [
        {"method": name, "seed": seed}
        for name, seed in named
        if not ledger.find(stage="run", method=name, seed=seed)
    ]


def in_order(methods: Sequence[Method], ledger: Ledger, seeds: Sequence[int]) -> None:
    """Raise `ShouldersError` for a method that takes up one that will not be there by then."""
    for place, method in enumerate(methods):
        before = {other.name for other in methods[:place]}
        for seed in seeds:
            if not ledger.find(stage="run", method=method.name, seed=seed):
                starts(method, ledger, seed, before)


def starts(
    method: Method, ledger: Ledger, seed: int, promised: Collection[str] = ()
) -> dict[str, Path]:
    """Return the skills that a method's parts begin at, or that it joins.

    Raises `ShouldersError` where they are not trained, nor `promised`.
    """
    found = {}
    for part, name in (method.start | {name: name for name in method.joins}).items():
        if name not in promised and not ledger.find(stage="run", method=name, seed=seed):
            raise ShouldersError(f"{method.name} takes up {name}: list {name} before it")
        found[part] = ledger.folder(name, seed)
    return found


def _facts(
    method: Method, plan: Plan, factor: float, done: Trained, trained_parameters: int
) -> dict[str, Any]:
    """Return what a training run cost and came to."""
    return {
        "trained_parameters": trained_parameters,
        "examples": method.steps(plan) // method.epochs * plan.rows_per_step,
        "epochs": method.epochs,
        "members": method.members,
        "rate_factor": factor,
        "training_seconds": done.seconds,
        "validation_loss": done.loss,
        "curve": done.curve,
    }

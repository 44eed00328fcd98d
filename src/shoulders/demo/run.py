"""What `shoulders demo` does, from top to bottom: one frozen LM learns twelve tasks, twice.

Read this file to see the library used: load an LM, make a mixture, train a static and an
input-dependent prefix for the same number of steps on the same rows, evaluate all on inputs
that training has not seen, save, and prove that the LM did not change.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shoulders.data.mixture import Mixture
from shoulders.data.templates import Templates
from shoulders.demo.plot import plot_tasks
from shoulders.demo.tasks import demo_rows
from shoulders.encoders.load import load_encoder
from shoulders.errors import require
from shoulders.evaluation.evaluate import EVALUATION_DECODING, Evaluation, evaluate
from shoulders.files import write_json
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.progress import quiet_progress
from shoulders.skills.artefact import save_skill
from shoulders.skills.skill import Skill
from shoulders.training.fit import fit
from shoulders.training.recipe import Recipe, make_recipe

PROMPT_TEXT = "Read the instruction and give only the short answer."
METHODS: dict[str, dict[str, Any]] = {
    "static": {"kind": "static_kv"},
    "input-dependent": {"kind": "idpt_kv", "generator": {"width": 384, "layers": 2, "heads": 6}},
}
LR_FOR = {"static": {}, "input-dependent": {"generator": 5e-4, "project": 1e-4}}
TEST_ROWS = 10  # per task
DECODING = EVALUATION_DECODING.model_copy(update={"max_new_tokens": 12})


def run_demo(out: Path, *, steps: int, seed: int, console: Console) -> dict[str, Any]:
    """Run the demo and return its scores; writes skills, a plot and `demo.json` to `out`."""
    started = time.monotonic()
    require("demo", "matplotlib")
    encoder = functools.cache(load_encoder)
    encoder("embedded")  # missing, it should be missed now

    # 1. One frozen LM. Its hash is taken before anything else happens.
    console.print("[bold]1.[/] Loading the frozen LM (the first time converts it, under a minute)")
    lm = load_lm("embedded")
    before = lm.digest()
    console.print(f"   {lm.parameters:,} frozen parameters, SHA-256 {before[:16]}...")

    # 2. Twelve tasks made from packages that know the answers; test items never occur in train.
    train, test = demo_rows(seed)
    test = [row for i, row in enumerate(test) if i % 25 < TEST_ROWS]  # 25 per task, in order
    templates = Templates()  # the instruction is already in the input
    console.print(f"[bold]2.[/] {len({r.task for r in train})} tasks, {len(train)} training rows")

    # 3. The LM alone, asked through its chat template.
    console.print("[bold]3.[/] The LM alone")
    base = Skill.base(lm)
    results = {"zero-shot": _evaluate("zero-shot", base, test, templates, console)}

    # 4. Train a static and an input-dependent prefix: same rows, same order, same steps.
    skills: dict[str, Skill] = {}
    for method in METHODS:
        console.print(f"[bold]4.[/] Training the {method} prompt")
        recipe = _recipe(method, steps, seed)
        assert recipe.data is not None  # the demo trains on tasks
        mixture = Mixture(train, templates, recipe.data, seed)
        random = torch.Generator().manual_seed(seed)
        skill = Skill.create(lm, recipe.skill, encoder, random)
        progress = fit(skill, mixture, [], templates, recipe, out / method, console=console)
        facts = {"steps": progress.step, "training_seconds": round(progress.seconds, 1)}
        save_skill(skill, out / method, templates, {**facts, "machine": machine()})
        results[method] = _evaluate(method, skill, test, templates, console)
        skills[method] = skill

    # 5. What came out.
    console.print(_table(results))
    plot_tasks(out / "demo.png", results)
    for row in test[:: len(test) // 3][:3]:
        text = templates.render(row)
        answers = {
            m: s.generate([text], DECODING)[0][0] for m, s in {"zero-shot": base, **skills}.items()
        }
        console.print(f"\n[bold]{escape(text)}[/]  (right: {escape(row.targets[0])})")
        for method, answer in answers.items():
            console.print(f"   {method:>16}: {' '.join(answer.text.split())}", markup=False)

    # 6. The proof: every byte of every weight is what it was.
    after = lm.digest()
    unchanged = after == before
    console.print(f"\nLM before {before}\nLM after  {after}\n[bold]unchanged: {unchanged}[/]")
    summary = {
        "tasks": len(results["zero-shot"].tasks),
        "steps": steps,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "lm_unchanged": unchanged,
        "lm_digest": after,
        "trained_parameters": {m: s.trained_parameters for m, s in skills.items()},
        "results": {method: result.as_dict() for method, result in results.items()},
        "machine": machine(),
    }
    write_json(out / "demo.json", summary)
    console.print(
        f"\nWritten to {out} in {summary['seconds']:.0f} s: demo.png, demo.json, two skills. Try\n"
        f"  shoulders generate --skill {out / 'input-dependent'} --text 'Plural of teacher?'",
        soft_wrap=True,
        markup=False,
    )
    return summary


def _recipe(method: str, steps: int, seed: int) -> Recipe:
    """Return what a YAML recipe would say; see `recipes/` for those."""
    init = {"source": "text", "text": PROMPT_TEXT}
    prompt = {**METHODS[method], "length": 10, "init": init}
    training = {
        "steps": steps,
        "rows_per_step": 12,
        "warmup_steps": 10,
        "optimizer": {"lr": 1e-2, "lr_for": LR_FOR[method]},
        "seed": seed,
    }
    data = {"train": ["made by shoulders.demo.tasks"]}
    return make_recipe(
        {"skill": {"passes": [{"prompt": prompt}]}, "data": data, "training": training}
    )


def _evaluate(
    name: str, skill: Skill, rows: list[Any], templates: Templates, console: Console
) -> Evaluation:
    with quiet_progress(console, f"evaluating {name}", len(rows)) as advance:
        return evaluate(skill, rows, templates, decoding=DECODING, on_rows=advance)


def _table(results: dict[str, Evaluation]) -> Table:
    table = Table(title="Exact match on unseen inputs, %", title_justify="left")
    table.add_column("task")
    for method in results:
        table.add_column(method, justify="right")
    for task in results["zero-shot"].tasks:
        table.add_row(task, *(f"{r.tasks[task]['exact_match']:.0f}" for r in results.values()))
    table.add_section()
    averages = []
    for result in results.values():
        low, high = result.ci95["exact_match"]
        averages.append(f"{result.metrics['exact_match']:.1f} [{low:.0f}, {high:.0f}]")
    table.add_row("average, 95%", *averages, style="bold")
    return table

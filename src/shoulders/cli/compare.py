"""`shoulders compare PLAN.yaml|--data FILE.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from shoulders.cli.common import check_outputs, emit_json, quiet_libraries, stderr, stdout
from shoulders.errors import RecipeError, ShouldersError, nearest

if TYPE_CHECKING:
    from shoulders.comparison.plan import Plan


def compare(
    plan: Annotated[
        Path | None, typer.Argument(help="A plan, see recipes/compare/multitask.yaml.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Instead of a plan: your rows, split for you.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=1, help="With --data: how long it may take. Default: 10.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs and report.")] = Path("runs/compare"),
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated; default: those of the plan.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key of the plan, such as seeds=[0,1]. Repeatable."),
    ] = None,
    lm: Annotated[str | None, typer.Option(help="LM: embedded, Hub id, folder, .gguf.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on: finished runs are kept.")
    ] = False,
    finished: Annotated[
        bool, typer.Option("--finished", help="Train nothing more: compare what is finished.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the plan; loads and trains nothing.")
    ] = False,
    join: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of a plan: the compare.json of parts of one. Repeatable."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write every figure here.")] = None,
) -> None:
    """Is the frozen LM enough? Compare frozen methods with fine-tuning on your own rows.

    Trains and measures every method on the same rows, order and seeds, and writes a report
    (report.html, report.md, compare.json) with a verdict in words. Safe to stop: --resume goes
    on, and --finished reports what there is.
    """
    from shoulders.comparison.join import joined
    from shoulders.comparison.own_rows import plan_of_rows, untested
    from shoulders.comparison.plan import Plan, read_plan
    from shoulders.comparison.run import run_comparison
    from shoulders.training.keys import override

    if [plan is None, data is None, not join].count(False) != 1:
        raise ShouldersError("give either a plan (YAML), or --data FILE.jsonl, or --join FILEs")
    if dry_run and plan is None:
        raise ShouldersError("--dry-run checks a plan (YAML): give one")
    if join and (methods or overrides or lm or resume or finished):
        raise ShouldersError("--join puts finished runs together: it takes --out and --json only")
    if minutes is not None and data is None:
        raise ShouldersError("--minutes goes with --data; in a plan it is budget.minutes")
    if dry_run and json is not None:
        raise ShouldersError("--dry-run only says whether a plan is valid: it writes no --json")
    check_outputs(json, read=[plan, data, *(join or ())])
    if join and (out / "plan.json").exists():
        raise ShouldersError(f"{out}: holds a comparison; choose another --out for what is joined")
    chosen = [name.strip() for name in methods.split(",")] if methods else None
    given = [*(overrides or ())]
    if chosen:
        given.append(f"methods=[{', '.join(chosen)}]")
    if lm:
        given.append(f"lm.name={lm}")
    parsed: Plan
    if join:
        _report(joined(join), out, json)
        return
    if plan is not None:
        parsed = read_plan(plan, given)
        if dry_run:
            stdout().print(f"{plan}: valid; {_facts(parsed)}", markup=False, highlight=False)
            return
    else:
        import torch

        assert data is not None
        fast = "int8" if lm is None and not torch.cuda.is_available() else "auto"
        settings: dict[str, Any] = {
            "budget": {} if minutes is None else {"minutes": minutes},
            "lm": {"dtype": fast},
        }
        for one in given:
            override(settings, one)
        if not {"examples", "minutes"} & settings["budget"].keys():
            settings["budget"]["minutes"] = 10
        if unknown := [key for key in settings if key not in Plan.model_fields]:
            known = nearest(unknown[0], Plan.model_fields)
            raise RecipeError(f"--set {unknown[0]}: a plan has no such key{known}")
        parsed = plan_of_rows(data, out, **settings)
        if small := untested(parsed):
            note = f"note: too few inputs to test on, trained on only: {', '.join(small)}"
            stderr().print(note, markup=False, highlight=False)
    quiet_libraries()
    result = run_comparison(parsed, out, resume=resume, finished=finished, console=stderr())
    _report(result, out, json)


def _facts(plan: Plan) -> str:
    seeds, asked = len(plan.seeds), ", ".join(plan.methods)
    budget = (
        f"{plan.steps():,} steps of {plan.rows_per_step} rows"
        if plan.budget.examples is not None
        else f"{plan.budget.minutes:g} minutes"
    )
    return (
        f"LM {plan.lm.name}, {len(plan.methods)} methods ({asked}), {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}, {budget}, {plan.search.trials} trials of each"
    )


def _report(result: dict[str, Any], out: Path, json: Path | None) -> None:
    from shoulders.comparison.report import write_report

    said = write_report(result, out)
    emit_json(json, {**result, "verdict": said})
    stdout().print(_table(out))
    for sentence in said:
        stdout().print(f"- {sentence}", markup=False, highlight=False)
    stdout().print(f"report: [bold]{escape(str(out / 'report.html'))}[/]")


def _table(out: Path) -> Table:
    from json import loads

    found = loads((out / "compare.json").read_text(encoding="utf-8"))
    table = Table()
    table.add_column("method", overflow="fold")  # names that differ at their ends
    for head in ("exact match, 95%", "to the best", "trained", "training", "an answer"):
        table.add_column(head)
    for line in found["lines"]:
        low, high = line["ci95"]
        table.add_row(
            escape(line["method"]),
            f"{line['exact_match']:.1f} [{low:.1f}, {high:.1f}]",
            found["difference_to_best"].get(line["method"], "best").removesuffix(" points"),
            f"{line['trained_parameters']:,}",
            f"{line['training_seconds']:.0f} s",
            f"{line['latency_ms']:.0f} ms",
        )
    return table

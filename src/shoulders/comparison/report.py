"""The report: one page of HTML that needs nothing else, and Markdown for a README."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from shoulders.comparison.figures import cost_figure, curves_figure
from shoulders.comparison.summary import Line, best, difference, lead, lines
from shoulders.comparison.verdict import verdict
from shoulders.files import write_json, write_text

RESULT, PAGE, TABLE = "compare.json", "report.html", "report.md"


def write_report(result: dict[str, Any], out: Path) -> list[str]:
    """Write `compare.json`, `report.html` and `report.md` into `out`; return the verdict.

    Args:
        result: what `run_comparison` or `joined` returned.
        out: the folder.
    """
    found = lines(result)
    forgetting = {f["method"]: f for f in result["forgetting"]}
    base = forgetting.get("frozen", {})
    unchanged = result["lm"]["digest_before"] == result["lm"]["digest_after"]
    said = verdict(found, base.get("perplexity"), digest_equal=unchanged)
    if parts := result.get("joined"):
        said.append(
            f"Put together from {len(parts)} comparisons: seconds of training and milliseconds of "
            "an answer were measured in each, on its machine, and compare within it only."
        )
    if left := [f"{run['method']}, seed {run['seed']}" for run in result.get("unfinished", [])]:
        said.append(f"Not finished yet, and not compared: {'; '.join(left)}.")
    first = best([line for line in found if line.family != "bare"]) or best(found)
    against = {
        line.name: str(difference(line, first)) for line in found if first and line is not first
    }
    facts = {
        "verdict": said,
        "best": first.name if first else None,
        "difference_to_best": against,
        "differences": {  # how much better the first is than each that stands after it
            line.name: {after.name: str(difference(line, after)) for after in found[place + 1 :]}
            for place, line in enumerate(found)
        },
        "rests_on": lead(found),
        "lines": [_figures(line) for line in found],
    }
    write_json(out / RESULT, {**result, **facts})
    write_text(out / TABLE, _markdown(found, said, against, result))
    figures = {
        "trained parameters": cost_figure(
            found, lambda x: float(x.trained_parameters), "trained parameters"
        ),
        "training compute": cost_figure(
            found, lambda x: x.training_seconds, "seconds of training on this machine"
        ),
        "inference latency": cost_figure(
            found,
            lambda x: x.latency_ms,
            "milliseconds an answer, one at a time",
            logarithmic=False,
        ),
        "memory per extra task": cost_figure(
            found, lambda x: x.bytes_per_task / 1e6, "MB for one more task"
        ),
        "learning curves": curves_figure(result["runs"], result["plan"]["rows_per_step"]),
    }
    template = files("shoulders.comparison").joinpath("report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        verdict=said, lines=found, against=against, figures=figures, result=result, base=base,
        tasks=sorted({task for line in found for task in line.tasks}),
    )  # fmt: skip
    write_text(out / PAGE, page)
    return said


def _figures(line: Line) -> dict[str, Any]:
    return {
        "method": line.name,
        "family": line.family,
        "exact_match": line.exact_match,
        "ci95": list(line.ci95),
        "by_seed": line.by_seed,
        "seeds": list(line.seeds),
        "f1": line.f1,
        "trained_parameters": line.trained_parameters,
        "examples": line.examples,
        "epochs": line.epochs,
        "members": line.members,
        "training_seconds": line.training_seconds,
        "latency_ms": line.latency_ms,
        "bytes_per_task": line.bytes_per_task,
        "perplexity": line.perplexity,
        "zero_shot": line.zero_shot,
        "tasks": line.tasks,
    }


def _markdown(
    found: Sequence[Line], said: Sequence[str], against: dict[str, str], result: dict[str, Any]
) -> str:
    names = ("method", "exact match, 95%", "to the best", "seeds", "trained", "examples",
             "training, s")  # fmt: skip
    head = f"| {' | '.join([*names, 'ms an answer'])} |"
    rows = [
        f"| {x.name} | {x.exact_match:.1f} [{x.ci95[0]:.1f}, {x.ci95[1]:.1f}] "
        f"| {against.get(x.name, 'best').removesuffix(' points')} "
        f"| {', '.join(map(str, x.seeds))} | {x.trained_parameters:,} "
        f"| {x.examples_read} | {x.training_seconds:.0f} | {x.latency_ms:.0f} |"
        for x in found
    ]
    counts, machine = result["rows"], result["machine"]
    return "\n".join(
        [
            *(f"- {sentence}" for sentence in said),
            "",
            head,
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"{result['lm']['name']}, {result['lm']['parameters']:,} parameters; "
            f"{counts['train']:,} training, {counts['validation']} validation and "
            f"{counts['test']} test rows; seeds {', '.join(map(str, result['plan']['seeds']))}; "
            f"{machine['processor']}, {machine['threads']} threads; {result['date']}.",
            "",
        ]
    )

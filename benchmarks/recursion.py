"""What recursion gains, against controls of equal compute and placebos.

    .venv/bin/python benchmarks/recursion.py textual --skill runs/multitask_textual --split test
    .venv/bin/python benchmarks/recursion.py neural --skill runs/multitask_neural --split test

`textual`: over n samples of the first pass, the second pass beside the first pass's greedy answer,
the majority of the samples (self-consistency), the likeliest of them, and the share of rows where
any of them is right, which no choosing can exceed; and quality against mean passes through the
gate. `neural`: the trained recursion beside its own last pass alone, and with
the Connector's output replaced by zeros, by another row's, by noise of its size: a gain that
survives these placebos is not the recursion's; other skills of the same LM may be asked `--beside`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from shoulders.data.rows import Row, read_rows
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.evaluation.evaluate import EVALUATION_DECODING, evaluate
from shoulders.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    macro_average,
    normalize,
    paired_interval,
)
from shoulders.files import atomic_path, write_json
from shoulders.lm.decode import Completion
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.progress import quiet_progress
from shoulders.recursion.candidates import Candidate, Chooser, chosen, merged, shown
from shoulders.skills.artefact import load_skill, read_artefact
from shoulders.skills.gate import confidence, direct
from shoulders.skills.parts import Earlier
from shoulders.skills.reader import first_line
from shoulders.skills.skill import Skill

ROOT = Path(__file__).parents[1]
CHOOSERS: tuple[Chooser, ...] = ("majority", "likeliest")
CEILING = "any of them"
PLACEBOS = ("zeros", "another row's", "noise")


def main() -> None:
    """Measure one skill on one split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("form", choices=("textual", "neural"))
    parser.add_argument("--skill", type=Path, required=True)
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/multitask")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--every", type=int, default=1, help="take every so-manieth row")
    parser.add_argument("--beside", metavar="NAME=DIR", nargs="+", default=[],
                        help="neural: other skills on the same rows")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    artefact = read_artefact(options.skill)
    lm = load_lm(artefact.lm.name, dtype=artefact.lm_dtype)  # type: ignore[arg-type]
    skill, templates = load_skill(options.skill, lm, functools.cache(load_encoder))
    rows = read_rows(options.data / f"{options.split}.jsonl")[:: options.every]
    measure = textual if options.form == "textual" else neural
    results = measure(skill, rows, templates, options)
    write_json(
        options.out,
        {
            "benchmark": f"recursion {options.form}",
            "split": options.split,
            "n": len(rows),
            "results": results,
            "trained_parameters": skill.trained_parameters,
            "provenance": without_paths(artefact.provenance),
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    plot(options.out.with_suffix(".png"), options.form, results)
    print(f"{'method':28} {'n':>4} {'passes':>7} exact match, 95%")
    for r in results:
        low, high = r["ci95"]
        print(f"{r['method']:28} {r.get('n', ''):>4} {r['passes']:7.2f} "
              f"{r['exact_match']:.1f} [{low:.1f}, {high:.1f}]")  # fmt: skip


def textual(
    skill: Skill, rows: Sequence[Row], templates: Templates, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return exact match of every chooser over 1, 4, ... of the same samples, and of the gate."""
    assert skill.proposals is not None  # or the skill is not textual
    config, console = skill.proposals.config, Console(stderr=True)
    texts = [templates.render(row, 0) for row in rows]
    first = direct(skill)
    with quiet_progress(console, "first pass, greedy", len(rows)) as advance:
        greedy = [c[0] for c in first.generate(texts, EVALUATION_DECODING, on_rows=advance)]
    with quiet_progress(console, f"{max(options.n)} samples", len(rows)) as advance:
        most = config.model_copy(update={"n": max(options.n)})
        samples = first.generate(texts, most.decoding(), on_rows=advance)
    results = [scored("first pass, greedy", rows, [c.text for c in greedy], passes=1)]
    seconds: list[str] = []
    for n in options.n:
        # Sample k of a row is the same, however many are drawn.
        candidates = [merged(several[:n]) for several in samples]
        for chooser in CHOOSERS:
            said = [chosen(own, chooser).text if own else "" for own in candidates]
            results.append(scored(chooser, rows, said, n=n, passes=1))
        results.append(scored(CEILING, rows, best_of(rows, candidates), n=n, passes=1))
        room = skill.input_room(EVALUATION_DECODING.max_new_tokens)
        read = [
            shown(t, own, config, skill.count_tokens, room).text
            for t, own in zip(texts, candidates, strict=True)
        ]
        with quiet_progress(console, f"second pass over {n}", len(rows)) as advance:
            answers = skill.last.generate(read, EVALUATION_DECODING, on_rows=advance)
        seconds = [several[0].text for several in answers]
        results.append(scored("second pass", rows, seconds, n=n, passes=2))
    return results + gated(skill, rows, greedy, seconds, options)


def best_of(rows: Sequence[Row], candidates: Sequence[Sequence[Candidate]]) -> list[str]:
    """Return for each row a right candidate, if there is one."""
    return [
        next((c.text for c in own if exact_match(first_line(c.text), row.targets, normalize)), "")
        for row, own in zip(rows, candidates, strict=True)
    ]


def neural(
    skill: Skill, rows: Sequence[Row], templates: Templates, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return exact match of the recursion, of its last pass alone, and of the placebos."""
    console = Console(stderr=True)
    found: list[dict[str, Any]] = []
    said: dict[str, list[str]] = {}
    contenders = {"recursion": skill, "last pass alone": direct(skill)}
    contenders |= {f"placebo: {name}": replaced(skill, name) for name in PLACEBOS}
    for name, equals, folder in (one.partition("=") for one in options.beside):
        assert equals, "--beside NAME=DIR"
        contenders[name] = load_skill(Path(folder), skill.lm, functools.cache(load_encoder))[0]
    for name, own in contenders.items():
        with quiet_progress(console, name, len(rows)) as advance:
            result = evaluate(own, rows, templates, on_rows=advance)
        said[name] = [p.prediction for p in result.predictions]
        facts = {"passes": len(own.parts.earlier) + 1, "trained_parameters": own.trained_parameters}
        found.append(scored(name, rows, said[name], **facts))
        if name != "recursion":  # row by row on the same rows
            better = paired_interval(marked(rows, said["recursion"]), marked(rows, said[name]))
            found[-1]["recursion_is_better_by"] = list(better)
    texts = [templates.render(row, 0) for row in rows]
    first = [c[0] for c in direct(skill).generate(texts, EVALUATION_DECODING)]
    return found + gated(skill, rows, first, said["recursion"], options)


def gated(
    skill: Skill,
    rows: Sequence[Row],
    first: Sequence[Completion],
    recursed: Sequence[str],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Return quality against mean passes: the gate's answers at several thresholds."""
    gate = read_artefact(options.skill).gate
    if gate is None:
        return []
    sure = [gate.probability(confidence(c)) for c in first]
    passes = len(skill.config.passes)
    results = []
    for least in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        said = [
            second if p < least else c.text
            for c, second, p in zip(first, recursed, sure, strict=True)
        ]
        share = sum(p < least for p in sure) / len(sure)
        mean = 1 + (passes - 1) * share
        results.append(scored("gate", rows, said, recurse_below=least, passes=mean))
    return results


class Replaced(nn.Module):
    """A link whose contribution is replaced: what it adds to the embeddings, or writes for them."""

    def __init__(self, link: Any, how: str) -> None:
        super().__init__()
        self.link, self.how, self.taps = link, how, link.taps

    def forward(self, states: Tensor, embeddings: Tensor, memory: Any = None) -> Tensor:
        """Return embeddings with zeros, another row's, or noise in place of the contribution."""
        out = self.link(states, embeddings, memory)
        base = embeddings if getattr(self.link, "skip", True) else torch.zeros_like(out)
        added = out - base
        if self.how == "zeros":
            added = torch.zeros_like(added)
        elif self.how == "noise":
            random = torch.Generator().manual_seed(0)
            noise = torch.randn(added.shape, generator=random).to(added)
            added = noise * added.std(-1, keepdim=True)
        else:  # the row before, in the same batch
            added = added.roll(1, 0)
        return base + added


def replaced(skill: Skill, how: str) -> Skill:
    """Return a skill whose links are placebos."""
    earlier = tuple(Earlier(e.producer, Replaced(e.link, how)) for e in skill.parts.earlier)
    return Skill(skill.lm, skill.config, skill.parts._replace(earlier=earlier))


def marked(rows: Sequence[Row], said: Sequence[str]) -> dict[str, list[float]]:
    """Return which rows were answered right (1) or not (0), by task."""
    by_task: dict[str, list[float]] = {}
    for row, text in zip(rows, said, strict=True):
        found = exact_match(first_line(text), row.targets, normalize)
        by_task.setdefault(row.task, []).append(float(found))
    return by_task


def scored(name: str, rows: Sequence[Row], said: Sequence[str], **facts: Any) -> dict[str, Any]:
    """Return macro exact match over tasks, with its bootstrap interval."""
    by_task = marked(rows, said)
    return {
        "method": name,
        **facts,
        "exact_match": macro_average(by_task),
        "ci95": list(bootstrap_interval(by_task)),
        "tasks": {task: 100 * sum(v) / len(v) for task, v in sorted(by_task.items())},
    }


def without_paths(value: Any) -> Any:
    """Return facts with files by name, wherever they lie here."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def plot(path: Path, form: str, results: Sequence[dict[str, Any]]) -> None:
    """Draw quality against the samples of the first pass, and against mean passes (the gate)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=form == "textual")
    if form == "textual":
        for method in ("second pass", *CHOOSERS, CEILING):
            own = [r for r in results if r["method"] == method]
            left.plot([r["n"] for r in own], [r["exact_match"] for r in own], "o-", label=method)
        first = results[0]
        left.axhline(first["exact_match"], color="#888888", label=first["method"])
        left.fill_between([1, max(r.get("n", 1) for r in results)], *first["ci95"], alpha=0.12)
        left.set_xscale("log", base=2)
        left.set_xlabel("samples of the first pass")
        left.legend(fontsize=8)
    else:
        own = [r for r in results if r["method"] != "gate"]
        errors = [[abs(r["exact_match"] - r["ci95"][side]) for r in own] for side in (0, 1)]
        left.barh([r["method"] for r in own], [r["exact_match"] for r in own], xerr=errors)
        left.invert_yaxis()
        left.set_xlabel("exact match, %")
    gate = [r for r in results if r["method"] == "gate"]
    right.plot([r["passes"] for r in gate], [r["exact_match"] for r in gate], "o-")
    for r in gate:
        right.annotate(f"{r['recurse_below']:g}", (r["passes"], r["exact_match"]), fontsize=8)
    right.set_xlabel("mean passes (gate: recurse below this probability)")
    right.set_ylabel("exact match, %")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    main()

"""The demo's plot: exact match by task, one bar per method."""

from __future__ import annotations

from pathlib import Path

from shoulders.errors import ShouldersError, install
from shoulders.evaluation.evaluate import Evaluation
from shoulders.files import atomic_path


def plot_tasks(path: Path, results: dict[str, Evaluation]) -> None:
    """Draw `results` (method -> evaluation) as a PNG of grouped bars, atomically."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ShouldersError(f"plots need matplotlib; {install('demo')}") from None
    tasks = list(next(iter(results.values())).tasks)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(results)
    for i, (method, result) in enumerate(results.items()):
        values = [result.tasks[task]["exact_match"] for task in tasks]
        places = [k + (i - (len(results) - 1) / 2) * width for k in range(len(tasks))]
        average = result.metrics["exact_match"]
        axes.bar(places, values, width, label=f"{method} (average {average:.1f})")
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right")
    axes.set_ylabel("exact match on unseen inputs, %")
    axes.set_title("One frozen LM, many tasks: what a small trained prompt adds")
    figure.legend(loc="outside lower center", ncols=len(results))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

"""The report's figures, as SVG text: quality against what it costs, and learning curves."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from shoulders.comparison.summary import Line
from shoulders.errors import ShouldersError, install

COLOURS = {"bare": "#777777", "frozen": "#1f6fb4", "tuned": "#d1661f"}
SAYS = {"bare": "LM alone", "frozen": "frozen LM", "tuned": "tuned LM"}


def cost_figure(
    lines: Sequence[Line], cost: Callable[[Line], float], label: str, *, logarithmic: bool = True
) -> str:
    """Draw exact match against a cost with its Pareto front: what nothing cheaper equals."""
    figure, axes = _axes()
    shown = [(max(cost(line), 0.0), line) for line in lines]
    for family, colour in COLOURS.items():
        own = [(x, line) for x, line in shown if line.family == family]
        if not own:
            continue
        spread = [
            [line.exact_match - line.ci95[0] for _, line in own],
            [line.ci95[1] - line.exact_match for _, line in own],
        ]
        axes.errorbar(
            [x for x, _ in own],
            [line.exact_match for _, line in own],
            yerr=[[max(0.0, v) for v in side] for side in spread],
            fmt="o",
            color=colour,
            capsize=2,
            label=SAYS[family],
        )
    for x, line in shown:
        axes.annotate(line.name, (x, line.exact_match), xytext=(5, 4), textcoords="offset points",
                      fontsize=7)  # fmt: skip
    front = pareto([(x, line.exact_match) for x, line in shown])
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color="#bbbbbb", zorder=0)
    if logarithmic:  # the LM alone costs nothing: 0 stands at the left edge
        smallest = min((x for x, _ in shown if x > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=smallest)
    axes.set_xlabel(label)
    axes.set_ylabel("exact match on test rows, %")
    axes.legend(fontsize=7)
    return _svg(figure)


def curves_figure(runs: Sequence[dict[str, Any]], rows_per_step: int) -> str:
    """Draw the loss on validation rows against examples; one line per method, its first seed."""
    figure, axes = _axes()
    drawn: set[str] = set()
    for run in runs:
        if not run.get("curve") or run["method"] in drawn:
            continue
        drawn.add(run["method"])
        style = "-" if run["family"] == "frozen" else "--"
        points = [(step * rows_per_step, loss) for step, loss in run["curve"]]
        axes.plot(*zip(*points, strict=True), style, marker=".", label=run["method"])
    axes.set_xlabel("training examples, counted with repetition")
    axes.set_ylabel("nats per answer token, validation rows")
    if drawn:
        axes.legend(fontsize=7)
    return _svg(figure)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, quality) that no cheaper or equally cheap one equals, by cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _axes() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ShouldersError(f"reports need matplotlib; {install('compare')}") from None
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "shoulders", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]

"""What a job has found on the way, as HTML tables and heat maps: pure functions of its details."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment

from shoulders.skills.attended import Attended
from shoulders.skills.reader import first_line

# Tokens, passages and answers are anybody's text: everything is escaped.
_PAGES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

_PASSAGES = _PAGES.from_string("""
<h4 class="sh">Passages: {{ rows | length }} found, {{ packed }} read</h4>
<div class="sh-scroll sh-tall"><table class="sh-table">
<tr><th>read</th><th>re-ranked</th><th>score</th><th>retrieved</th><th>score</th><th>passage</th></tr>
{% for row in rows %}
<tr class="{{ 'sh-read' if row.read }}">
<td>{{ {"whole": "yes", "cut": "its start"}.get(row.read, "") }}</td>
<td>{{ row.ranked }}</td><td>{{ "%.3f" % row.score }}</td>
<td>{{ row.retrieved }}</td>
<td>{{ "%.2f" % row.retrieved_score if row.retrieved_score is not none }}</td>
<td><details><summary>{{ row.title or row.text[:60] }}</summary>{{ row.text }}</details></td>
</tr>
{% endfor %}
</table></div>
""")

_CANDIDATES = _PAGES.from_string("""
<h4 class="sh">Candidates of the first pass</h4>
<table class="sh-table">
<tr><th>chosen</th><th>candidate</th><th>samples</th><th>log-probability per token</th>
<th>shown</th></tr>
{% for row in rows %}
<tr class="{{ 'sh-read' if row.chosen }}">
<td>{{ "yes" if row.chosen }}</td><td>{{ row.text }}</td><td>{{ row.count }}</td>
<td>{{ "%.2f" % row.logprob }}</td><td>{{ "yes" if row.shown else "no room" }}</td></tr>
{% endfor %}
</table>
<p class="sh-note">{{ note }}</p>
""")

_READ = _PAGES.from_string("""
{% for text in texts %}
<details class="sh-text"><summary>What {{ "the last" if loop.last else "an earlier" }} pass read
</summary><pre>{{ text }}</pre></details>
{% endfor %}
""")

_HEAT = _PAGES.from_string("""
<h4 class="sh">What the prompt{{ " of pass %d" % number if several }} attended to</h4>
<div class="sh-scroll"><table class="sh-heat">
<tr><th></th>{% for token in tokens %}<th><span>{{ token }}</span></th>{% endfor %}</tr>
{% for row in rows %}
<tr><th>{{ loop.index }}</th>{% for value, shade in row -%}
<td style="--w:{{ "%.2f" % shade }}" title="{{ "%.3f" % value }}"></td>
{%- endfor %}</tr>
{% endfor %}
</table></div>
<p class="sh-note">Rows: the {{ rows | length }} prompt positions. Columns: the input tokens that
the frozen encoder read. Cross-attention of the prompt generator's last layer, mean over its heads;
each row sums to 1, the darkest cell is {{ "%.2f" % most }}.</p>
""")

_NOTES = {
    "second_pass": "The second pass read the candidates and wrote the answer; a candidate is "
    "marked where it is that answer.",
    "majority": "The most frequent candidate is the answer.",
    "likeliest": "The likeliest candidate is the answer.",
}


def details_html(details: dict[str, Any], answer: str) -> str:
    """Return a job's details as HTML; empty where there are none."""
    parts = []
    if "found" in details:
        rows = details["found"]
        packed = sum(row["read"] is not None for row in rows)
        parts.append(_PASSAGES.render(rows=rows, packed=packed))
    if "candidates" in details:
        rows = candidate_rows(details, answer)
        parts.append(_CANDIDATES.render(rows=rows, note=_NOTES[details["chooser"]]))
    if "read" in details:
        parts.append(_READ.render(texts=details["read"]))
    return "".join(parts)


def candidate_rows(details: dict[str, Any], answer: str) -> list[dict[str, Any]]:
    """Return the candidates, each with whether it is the answer (compared by first lines)."""
    said = first_line(answer)
    return [{**row, "chosen": row["text"] == said} for row in details["candidates"]]


def heat_html(maps: Sequence[Attended]) -> str:
    """Return what prompts attended to, one heat map for each; empty where there are none."""
    return "".join(
        _HEAT.render(
            number=one.number,
            several=len(maps) > 1,
            # A token that is nothing but white space must still be seen.
            tokens=[token.replace("\n", "⏎").replace(" ", "·") for token in one.tokens],
            rows=shades(one.weights.tolist()),
            most=float(one.weights.max()),
        )
        for one in maps
    )


def shades(weights: Sequence[Sequence[float]]) -> list[list[tuple[float, float]]]:
    """Return each weight with its shade in [0, 1]: the largest of all has 1."""
    most = max((value for row in weights for value in row), default=0.0) or 1.0
    return [[(value, value / most) for value in row] for row in weights]


STYLE = """
.sh-scroll { overflow-x: auto; }
.sh-tall { max-height: 26rem; overflow-y: auto; }
h4.sh { font-size: 1rem; font-weight: 600; margin: 1rem 0 .4rem; }
.sh-note { opacity: .75; }
.sh-note, .sh-note p { font-size: .8rem !important; }
.sh-table { border-collapse: collapse; width: 100%; font-size: .85rem; }
.sh-table th { text-align: left; font-weight: 600; }
.sh-table th, .sh-table td { padding: .25rem .6rem; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary); }
.sh-table tr.sh-read td { background: color-mix(in srgb, var(--color-accent) 12%, transparent); }
.sh-table summary, .sh-text summary { cursor: pointer; }
.sh-text { margin-top: .6rem; font-size: .85rem; }
.sh-text pre { white-space: pre-wrap; }
.sh-heat { border-collapse: collapse; font-size: .75rem; }
.sh-heat th { font-weight: 400; text-align: right; padding: 0 .4rem 0 0; }
.sh-heat tr:first-child th { vertical-align: bottom; padding: 0 0 .2rem; }
.sh-heat tr:first-child span { writing-mode: vertical-rl; transform: rotate(180deg);
  max-height: 8rem; white-space: pre; }
.sh-heat td { width: 1.4rem; min-width: 1.4rem; height: .95rem;
  border: 1px solid var(--body-background-fill); background: color-mix(in srgb,
  var(--color-accent) calc(var(--w) * 100%), var(--background-fill-secondary)); }
"""

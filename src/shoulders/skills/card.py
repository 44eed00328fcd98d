"""The model card of a skill, written from what `skill.json` holds."""

from __future__ import annotations

from typing import Any

import jinja2

_CARD = """\
---
library_name: shoulders
base_model: {{ lm.name }}
tags: [soft-prompt, frozen-lm]
---
# {{ name }}

A skill for a frozen language model: {{ "{:,}".format(trained_parameters) }} trained parameters
around `{{ lm.name }}`, whose own weights are unchanged.

| | |
|---|---|
{% for one in skill.passes -%}
| pass {{ loop.index }} | {{ one | described }} |
{% endfor -%}
| LM fingerprint | `{{ lm.fingerprint }}` |
{% for encoder in encoders -%}
| encoder | `{{ encoder.name }}`, fingerprint `{{ encoder.fingerprint }}` |
{% endfor -%}
{% for key, value in provenance.items() if value is string or value is number -%}
| {{ key }} | {{ value }} |
{% endfor %}
## Use

```bash
shoulders generate --skill PATH/TO/THIS/FOLDER --text "..."
shoulders info PATH/TO/THIS/FOLDER
```

It loads only on the LM with this fingerprint. Tasks seen in training: {{ templates | length }}
template group(s); see `skill.json` for the exact texts, data hashes and settings.
"""


def model_card(name: str, artefact: dict[str, Any]) -> str:
    """Return the README of a skill's folder, Markdown with the Hub's metadata header."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["described"] = _described
    return environment.from_string(_CARD).render(name=name, **artefact)


def _described(one: dict[str, Any]) -> str:
    """Say in words what a pass is."""
    prompt, link, propose = one["prompt"], one["link"], one["propose"]
    words = [f"prompt `{prompt['kind']}`, {prompt['length']} positions" if prompt else "no prompt"]
    if link is not None:
        kind = link if link == "same" else link["kind"]
        words.append(f"its states go on through a link (`{kind}`)")
    if propose is not None:
        words.append(f"{propose['n']} sampled answers go on as text")
    return "; ".join(words)

"""What first passes propose for texts, kept on disk part by part: sampling takes long."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.encoders.load import load_encoder
from shoulders.files import write_json
from shoulders.lm.load import load_lm
from shoulders.progress import quiet_progress
from shoulders.recursion.candidates import Candidate, check_some, merged
from shoulders.skills.artefact import load_skill
from shoulders.skills.skill import Skill
from shoulders.training.recipe import Recipe

CANDIDATES = "candidates"
PART = 256  # rows whose candidates are kept at once


def candidates_of(
    recipe: Recipe,
    folder: Path,
    texts: Sequence[str],
    console: Console,
    cache: Path | None = None,
) -> list[list[Candidate]]:
    """Return what the first pass in `folder` proposes for texts; finished parts are kept."""
    before = recipe.skill.before_text()
    assert before is not None  # the recipe's validator
    propose = before[1]
    skill: Skill | None = None
    found: list[list[Candidate]] = []
    cache = (cache or folder) / CANDIDATES
    with quiet_progress(console, f"candidates of {folder.name}", len(texts)) as advance:
        for start in range(0, len(texts), PART):
            part = texts[start : start + PART]
            # How they are shown changes nothing about them.
            content = json.dumps([propose.decoding().model_dump(mode="json"), list(part)])
            key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
            file = cache / f"{key[:32]}.json"
            if not file.is_file():
                if skill is None:
                    lm = load_lm(**recipe.lm.model_dump())
                    skill, _ = load_skill(folder, lm, functools.cache(load_encoder))
                began = time.monotonic()
                samples = skill.generate(part, propose.decoding())
                seconds = time.monotonic() - began
                own = [merged(several) for several in samples]
                rows = [[[c.text, c.count, c.logprob] for c in row] for row in own]
                write_json(file, {"seconds": seconds, "candidates": rows})
            for row in _kept(file)[1]:
                found.append([Candidate(*values) for values in row])
            advance(len(part))
    check_some(found)
    return found


def _kept(file: Path) -> tuple[float, list[list[Any]]]:
    """Return the seconds that proposing a part's candidates took, and these."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(kept, list):  # as runs noted them that were begun before 2026-12
        return 0.0, kept
    return float(kept["seconds"]), kept["candidates"]


def proposing_seconds(folders: Iterable[Path]) -> float:
    """Return what proposing all candidates in some folders took, whichever run did it."""
    return sum(_kept(file)[0] for f in folders for file in (f / CANDIDATES).glob("*.json"))

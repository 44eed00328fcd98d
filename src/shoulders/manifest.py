"""Reading the JSON file that describes a folder we wrote: of a skill, a reader, a re-ranker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from shoulders.errors import ArtefactError

M = TypeVar("M", bound=BaseModel)


def read_versioned(folder: Path, name: str, model: type[M], version: int, what: str) -> M:
    """Read and validate a file with a `format_version`; `what` names the folder's kind.

    Raises `ArtefactError` naming the file and what is wrong with it.
    """
    file = folder / name
    if not file.is_file():
        raise ArtefactError(f"{folder}: holds no {name}: not a (finished) {what}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        found = values.get("format_version") if isinstance(values, dict) else None
        if found != version:
            raise ArtefactError(
                f"{file}: format version {found!r}, this version of shoulders reads {version}"
            )
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(f"{file}: damaged: key '{key}': {first['msg']}") from error
    except (ValueError, RecursionError) as error:  # also of integers of thousands of digits
        raise ArtefactError(f"{file}: damaged: not valid JSON: {error}") from error

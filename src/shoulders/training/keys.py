"""Dotted keys of recipes and plans: what is wrong at which, and setting one (`--set KEY=VALUE`)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from shoulders.data.yaml_loader import NO_YAML, read_yaml
from shoulders.errors import RecipeError, nearest
from shoulders.prompts.build import config_of, kind_of
from shoulders.recursion.connector import ConnectorConfig
from shoulders.recursion.latent import LatentConfig


def explain(error: ValidationError, model: type[BaseModel], values: Any) -> str:
    """Return the first problem of validating `values` as one line with its dotted key."""
    # A misspelt key may leave a required one missing: say what was misspelt.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    place = _place(first["loc"], values)
    key = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, place[:-1], values)
        return f"unknown key '{key}'{nearest(str(place[-1]), known)}"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    said = str(first["msg"]).removeprefix("Value error, ")
    return f"key '{key}': {said}" if key else said


def _place(loc: tuple[int | str, ...], values: Any) -> tuple[int | str, ...]:
    """Return a problem's place without what pydantic names beside keys: the kinds of a union."""
    found: list[int | str] = []
    for number, part in enumerate(loc, 1):
        inside = isinstance(values, dict) and part in values
        # A list may be too short for the place at which something is missing.
        if inside or (isinstance(values, list) and part in range(len(values))):
            values = values[part]
        elif number < len(loc) or not str(part).isidentifier():
            continue
        found.append(part)
    return tuple(found)


def _fields_at(model: type[BaseModel], place: tuple[int | str, ...], values: Any) -> list[str]:
    """Return the valid keys of the part of a recipe's `values` at `place`."""
    at: Any = model
    for part in place:
        values = values[part]
        if isinstance(part, int):
            continue
        field = at.model_fields.get(part) if hasattr(at, "model_fields") else None
        if field is None:
            return []
        at = field.annotation
        for inner in getattr(at, "__args__", ()):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                at = inner
        if part == "prompt":  # its fields are those of its kind of producer
            at = config_of(kind_of(values))
        elif part == "link" and isinstance(values, dict):
            at = LatentConfig if values.get("kind") == "latent" else ConnectorConfig
    return list(getattr(at, "model_fields", {}))


def override(values: dict[str, Any], given: str) -> None:
    """Set a dotted key of nested mappings, `key=value` with YAML's values, in place.

    Raises `RecipeError` for what is no such key or value.
    """
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {given}: expected key=value, such as training.steps=100")
    at: Any = values
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(at, list):
            at = at[int(part)] if part.isdecimal() and int(part) < len(at) else None
        elif isinstance(at, dict):
            at = at.setdefault(part, {})
        if not isinstance(at, dict | list):
            raise RecipeError(f"--set {given}: '{part}' holds no further keys")
    try:
        value = read_yaml(text)
    except NO_YAML as error:
        raise RecipeError(f"--set {given}: '{text[:80]}' is not a YAML value") from error
    if isinstance(value, str):
        value = _number(value)
    if isinstance(at, list):
        if not last.isdecimal() or int(last) >= len(at):
            raise RecipeError(f"--set {given}: '{last}' is not a place in that list")
        at[int(last)] = value
    else:
        at[last] = value


def _number(text: str) -> float | str:
    """Read `3e-2`, which YAML 1.1 takes for text, as the number everyone means."""
    try:
        return float(text)
    except ValueError:
        return text

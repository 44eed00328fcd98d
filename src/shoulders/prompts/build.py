"""From a recipe's `{kind: ..., ...}` to a producer."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, cast

from pydantic import BaseModel

from shoulders.errors import RecipeError, nearest
from shoulders.prompts import producers
from shoulders.prompts.interface import Producer, Surroundings

ENTRY_POINTS = "shoulders.producers"
DEFAULT_KIND = "idpt_lowrank"  # of the lowest loss on validation rows of 24 tasks: docs/log.md


def producer_kinds() -> list[str]:
    """Return the kinds there are: this package's modules, then other packages' entry points."""
    own = [module.name for module in pkgutil.iter_modules(producers.__path__)]
    return own + [point.name for point in entry_points(group=ENTRY_POINTS)]


def producer_config(spec: Mapping[str, Any]) -> BaseModel:
    """Validate `spec` against its kind's `Config`.

    Raises `RecipeError` for an unknown kind, `pydantic.ValidationError` otherwise.
    """
    fields = {name: value for name, value in spec.items() if name != "kind"}
    return config_of(kind_of(spec)).model_validate(fields)


def kind_of(spec: Mapping[str, Any]) -> Any:
    """Return the kind that `spec` names, or the default one."""
    return spec.get("kind", DEFAULT_KIND)


def rates_of(kind: Any) -> dict[str, Any] | None:
    """Return the optimizer and learning rates that training a kind of producer begins with.

    `lr`, and `kind` and `lr_for` where they are not the usual ones, as an optimizer's settings have
    them; None where its module has no `RATES`.
    """
    return getattr(_module(kind), "RATES", None)


def config_of(kind: Any) -> type[BaseModel]:
    """Return the `Config` of a kind of producer; raises `RecipeError` for an unknown one."""
    config: type[BaseModel] = _module(kind).Config
    return config


def build_producer(spec: Mapping[str, Any], around: Surroundings) -> Producer:
    """Build the producer that `spec` names, with values yet to be initialised or loaded."""
    made = _module(kind_of(spec)).Producer(producer_config(spec), around)
    return cast(Producer, made)


def _module(kind: Any) -> ModuleType:
    if kind in [module.name for module in pkgutil.iter_modules(producers.__path__)]:
        return importlib.import_module(f"{producers.__name__}.{kind}")
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == kind:
            return cast(ModuleType, point.load())
    known = producer_kinds()
    hint = nearest(str(kind), known)
    raise RecipeError(f"producer kind '{kind}' is unknown{hint}; known: {', '.join(known)}")

"""Make lm-evaluation-harness know our model."""

from __future__ import annotations

from shoulders.reader.libraries import needed

NAME = "shoulders"
TARGET = "shoulders.evaluation.harness.model:HarnessModel"


def register() -> None:
    """Add `shoulders` to the harness's models; it is loaded when it is asked for.

    Version 0.4.13 looks for no entry points of other packages: its registry is filled by whoever
    starts it.

    Raises `ShouldersError` where the harness is not installed.

    Example:
        >>> import lm_eval
        >>> register()
        >>> lm_eval.simple_evaluate(model="shoulders", model_args="skill=runs/skill",
        ...                         tasks=["arc_easy"])  # doctest: +SKIP
    """
    needed("lm_eval.models", "harness")  # its own models: looked up only in an empty registry
    registry = needed("lm_eval.api.registry", "harness").model_registry
    if NAME not in registry:
        registry.register(NAME, target=TARGET)

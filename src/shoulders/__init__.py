"""Neural middleware for frozen language models (arXiv 2204.10019).

What most programs need stands here, imported when it is first asked for:

>>> import shoulders
>>> recipe = shoulders.read_recipe("recipe.yaml")  # doctest: +SKIP
>>> skill = shoulders.train(recipe, "runs/skill")  # doctest: +SKIP
>>> lm = shoulders.load_lm("embedded")  # doctest: +SKIP
>>> skill, templates = shoulders.load("runs/skill", lm)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoulders.comparison.plan import read_plan as read_plan
    from shoulders.comparison.run import run_comparison as run_comparison
    from shoulders.data.rows import read_rows as read_rows
    from shoulders.data.templates import Templates as Templates
    from shoulders.encoders.load import load_encoder as load_encoder
    from shoulders.errors import ShouldersError as ShouldersError
    from shoulders.evaluation.evaluate import evaluate as evaluate
    from shoulders.lm.decode import DecodingConfig as DecodingConfig
    from shoulders.lm.load import load_lm as load_lm
    from shoulders.skills.artefact import load_skill as load_skill
    from shoulders.skills.artefact import save_skill as save_skill
    from shoulders.skills.config import SkillConfig as SkillConfig
    from shoulders.skills.ensemble import Ensemble as Ensemble
    from shoulders.skills.ensemble_artefact import load_ensemble as load_ensemble
    from shoulders.skills.ensemble_artefact import save_ensemble as save_ensemble
    from shoulders.skills.load import load as load
    from shoulders.skills.peft_format import export_to_peft as export_to_peft
    from shoulders.skills.peft_format import import_from_peft as import_from_peft
    from shoulders.skills.skill import Skill as Skill
    from shoulders.training.ensemble import run_ensemble as run_ensemble
    from shoulders.training.recipe import make_recipe as make_recipe
    from shoulders.training.recipe import read_recipe as read_recipe
    from shoulders.training.run import run_recipe as run_recipe
    from shoulders.training.textual import run_textual as run_textual
    from shoulders.training.train import train as train

__version__ = "0.1.0"

_HOMES = {
    "DecodingConfig": "lm.decode",
    "Ensemble": "skills.ensemble",
    "ShouldersError": "errors",
    "Skill": "skills.skill",
    "SkillConfig": "skills.config",
    "Templates": "data.templates",
    "evaluate": "evaluation.evaluate",
    "export_to_peft": "skills.peft_format",
    "import_from_peft": "skills.peft_format",
    "load": "skills.load",
    "load_encoder": "encoders.load",
    "load_ensemble": "skills.ensemble_artefact",
    "load_lm": "lm.load",
    "load_skill": "skills.artefact",
    "make_recipe": "training.recipe",
    "read_plan": "comparison.plan",
    "read_recipe": "training.recipe",
    "read_rows": "data.rows",
    "run_comparison": "comparison.run",
    "run_ensemble": "training.ensemble",
    "run_recipe": "training.run",
    "run_textual": "training.textual",
    "save_ensemble": "skills.ensemble_artefact",
    "save_skill": "skills.artefact",
    "train": "training.train",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import shoulders` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shoulders' has no attribute '{name}'")
    return getattr(import_module(f"shoulders.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""The recipe of a frozen reader: a collection, questions, a re-ranker, and a prompt that reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoulders.encoders.load import EMBEDDED
from shoulders.errors import RecipeError
from shoulders.reader.rerankers.cross_encoder import CrossEncoderConfig
from shoulders.skills.config import SkillConfig
from shoulders.skills.reader import ReadingConfig
from shoulders.skills.reader_artefact import SearchConfig
from shoulders.training.configs import CrossFitConfig, LMConfig, TrainingConfig
from shoulders.training.keys import explain
from shoulders.training.recipe import located, read_values, with_rates


class RerankingConfig(BaseModel):
    """What puts passages in order, beside the retriever's own scores.

    Their scores become one probability by a fusion that is fitted on training questions.

    Attributes:
        similarity: a frozen sentence encoder: `embedded`, a Hub id or a folder; null for none.
        cross_encoder: trained on the same questions; null for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    similarity: str | None = EMBEDDED
    cross_encoder: CrossEncoderConfig | None = None


class ReaderSection(BaseModel):
    """What is read, and how.

    Attributes:
        collection: passages (`.tsv`, `.jsonl`, a folder of documents), or an index of them.
        train: questions with answers, to train on.
        validation: questions to select and to calibrate on.
        search: what finds passages; all retrievers but `sparse` need vectors in the index.
        reranker: orders what was found; null keeps the retriever's order.
        reading: how passages are packed and answers written.
        unanswerable: whether to `keep` or `drop` training questions whose window holds no answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    collection: str
    train: list[str] = Field(min_length=1)
    validation: list[str] = []
    search: SearchConfig = SearchConfig()
    reranker: RerankingConfig | None = RerankingConfig()
    reading: ReadingConfig = ReadingConfig()
    unanswerable: Literal["keep", "drop"] = "keep"

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        if self.reading.abstain_below is not None and not self.validation:
            raise ValueError("reading.abstain_below needs validation questions to calibrate on")
        return self


class ReaderRecipe(BaseModel):
    """A whole reader; `start` and `cross_fit` are those of `Recipe`, for readers that recurse."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm: LMConfig = LMConfig()
    skill: SkillConfig
    reader: ReaderSection
    start: dict[str, str] = {}
    cross_fit: CrossFitConfig | None = None
    training: TrainingConfig


def is_reader(path: Path) -> bool:
    """Tell whether a recipe file describes a reader; raises as `read_recipe` does."""
    return "reader" in read_values(path)


def read_reader_recipe(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> ReaderRecipe:
    """Read a reader's recipe; paths and errors are those of `read_recipe`."""
    recipe = make_reader_recipe(read_values(path, overrides), str(path))

    def one(name: str) -> str:
        return located(name, path.parent)

    reader = recipe.reader.model_copy(
        update={
            "collection": one(recipe.reader.collection),
            "train": [one(name) for name in recipe.reader.train],
            "validation": [one(name) for name in recipe.reader.validation],
        }
    )
    start = {part: one(name) for part, name in recipe.start.items()}
    return recipe.model_copy(update={"reader": reader, "start": start})


def make_reader_recipe(values: dict[str, Any], where: str = "recipe") -> ReaderRecipe:
    """Validate a recipe given as nested mappings; raises `RecipeError` naming `where`."""
    try:
        return ReaderRecipe.model_validate(with_rates(values))
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, ReaderRecipe, values)}") from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error

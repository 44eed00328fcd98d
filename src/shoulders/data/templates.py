"""Natural-language templates (Jinja) that turn a row's input into the text the LM reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
import yaml

from shoulders.data.rows import Row
from shoulders.data.yaml_loader import UniqueKeyLoader
from shoulders.errors import DataError, nearest

FALLBACK = "*"
_VARIABLES = ("input", "task", "options")


class Templates:
    """Templates by task name; the key `*` serves every task that is not named.

    A template sees `input`, `task` and, for rows that have answer choices, `options` (a tuple
    of texts; elsewhere undefined, so write `{% if options is defined %}`). A row's input is
    inserted as it is, never read as a template. White space around a rendered text is dropped.
    """

    def __init__(
        self, templates: Mapping[str, Sequence[str]] | None = None, *, source: str = "templates"
    ) -> None:
        """Compile `templates`, by default `{"*": ["{{ input }}"]}`.

        `source` is the file that messages name. Raises `DataError` for a template that Jinja
        cannot read, that uses an unknown variable, or that leaves out `{{ input }}`.
        """
        given = {FALLBACK: ["{{ input }}"]} if templates is None else templates
        self._source = source
        # Templates come from files of others (recipes, artefacts), so they run sandboxed.
        environment = jinja2.sandbox.SandboxedEnvironment(
            undefined=jinja2.StrictUndefined, autoescape=False
        )
        self._texts: dict[str, tuple[str, ...]] = {}
        self._compiled: dict[str, tuple[jinja2.Template, ...]] = {}
        for task, texts in given.items():
            self._check_names(task, texts)
            self._texts[task] = tuple(texts)
            self._compiled[task] = tuple(
                self._compile(environment, text, self._place(task, which))
                for which, text in enumerate(texts)
            )
        if not self._texts:
            raise DataError(f"{source}: no templates; add at least '*': ['{{{{ input }}}}']")

    @classmethod
    def read(cls, path: Path | str) -> Templates:
        """Read a YAML file: a mapping from task name to a list of templates.

        Raises `DataError` naming the file, and the line or the task with the template's number.
        """
        path = Path(path)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise DataError(f"{path}: cannot read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not valid UTF-8 at byte {error.start + 1}") from None
        try:
            value = yaml.load(text, Loader=UniqueKeyLoader)
        except yaml.YAMLError as error:
            raise DataError(_yaml_message(path, error)) from None
        except (ValueError, AttributeError, RecursionError) as error:  # `2024-13-45`, `!!int abc`
            raise DataError(f"{path}: not valid YAML: {error}") from None
        return cls.from_dict(value, source=str(path))

    @classmethod
    def from_dict(cls, value: Any, *, source: str = "templates") -> Templates:
        """Build from what `as_dict` returned (or from parsed JSON or YAML, which is checked)."""
        if not isinstance(value, dict):
            raise DataError(f"{source}: must map task names to lists of templates")
        return cls(value, source=source)

    def as_dict(self) -> dict[str, list[str]]:
        """Return the templates as JSON-ready values, for storing in an artefact."""
        return {task: list(texts) for task, texts in self._texts.items()}

    def named_tasks(self) -> list[str]:
        """Return the task names that have templates of their own, sorted."""
        return sorted(task for task in self._texts if task != FALLBACK)

    def count(self, task: str) -> int:
        """Return how many templates serve `task`; raises `DataError` if none does."""
        return len(self._texts[self._key(task)])

    def texts(self, row: Row) -> list[str]:
        """Render every template of the row's task; raises `DataError` as `render` does."""
        return [self.render(row, which) for which in range(self.count(row.task))]

    def render(self, row: Row, which: int = 0) -> str:
        """Render template `which`, modulo the number of templates; 0 is the canonical one.

        Raises `DataError` if the template fails on this row or renders to nothing.
        """
        at = f"{row.where}: " if row.where else ""
        try:
            key = self._key(row.task)
        except DataError as error:
            raise DataError(f"{at}{error}") from None
        which %= len(self._compiled[key])
        variables: dict[str, Any] = {"input": row.input, "task": row.task}
        if row.options is not None:
            variables["options"] = row.options
        try:
            text = self._compiled[key][which].render(variables).strip()
        except Exception as error:  # a template is a program: it can raise anything
            place = self._place(key, which)
            reason = " ".join(str(error).split())
            raise DataError(
                f"{at}{place}: cannot be rendered for task '{row.task}': {reason}"
            ) from error
        if not text:
            place = self._place(key, which)
            raise DataError(f"{at}{place}: renders to nothing for input {row.input[:60]!r}")
        return text

    def _key(self, task: str) -> str:
        if task in self._texts:
            return task
        if FALLBACK in self._texts:
            return FALLBACK
        hint = nearest(task, self._texts)
        raise DataError(f"{self._source}: no templates for task '{task}' and no '*'{hint}")

    def _place(self, task: str, which: int) -> str:
        return f"{self._source}: task '{task}', template {which + 1}"

    def _check_names(self, task: Any, texts: Any) -> None:
        if not isinstance(task, str):
            raise DataError(f"{self._source}: task name {task!r} is no text; put it in quotes")
        if not isinstance(texts, list | tuple) or not texts:
            raise DataError(f"{self._source}: task '{task}' needs a list of templates (- ...)")
        for which, text in enumerate(texts):
            if not isinstance(text, str):
                place = self._place(task, which)
                raise DataError(f"{place}: must be a text, not {text!r}; put it in quotes")

    @staticmethod
    def _compile(environment: jinja2.Environment, text: str, place: str) -> jinja2.Template:
        try:
            used = jinja2.meta.find_undeclared_variables(environment.parse(text))
            template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise DataError(f"{place}: not a valid template: {error.message}") from None
        for name in sorted(used - set(_VARIABLES) - set(environment.globals)):
            hint = nearest(name, _VARIABLES) or f"; use {', '.join(_VARIABLES)}"
            raise DataError(f"{place}: unknown variable '{name}'{hint}")
        if "input" not in used:
            raise DataError(f"{place}: leaves out the input; add {{{{ input }}}}")
        return template


def _yaml_message(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    # `- {{ input }}` is a mapping to YAML, the most likely mistake in such a file.
    hint = "; put templates that begin with {{ in quotes" if "unhashable" in problem else ""
    return f"{where}: not valid YAML: {problem}{hint}"

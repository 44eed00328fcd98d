"""The skills that are served, by name: on one frozen LM, added and removed while it runs."""

from __future__ import annotations

import functools
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

from shoulders.encoders.load import load_encoder
from shoulders.errors import ArtefactError, ShouldersError
from shoulders.lm.frozen import FrozenLM
from shoulders.reader.contexts import Contexts
from shoulders.reader.engines.opening import open_passages
from shoulders.skills.artefact import ENSEMBLE, FILE, saved_in
from shoulders.skills.config import SkillConfig, TextFormat
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.load import load, provenance_of
from shoulders.skills.reader import Reader
from shoulders.skills.reader_artefact import FILE as READER_FILE
from shoulders.skills.reader_artefact import open_reranker, read_reader
from shoulders.skills.skill import Skill

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")


class Served(NamedTuple):
    """A skill by its name; `folder` is None for the LM itself."""

    name: str
    answers: Skill | Reader | Ensemble
    folder: Path | None
    created: int

    @property
    def skill(self) -> Skill:
        """The skill, of a reader too; of an ensemble the first member."""
        if isinstance(self.answers, Ensemble):
            return self.answers.members[0]
        return self.answers.skill if isinstance(self.answers, Reader) else self.answers

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters, of all members."""
        whole = self.answers if isinstance(self.answers, Ensemble) else self.skill
        return whole.trained_parameters


class UnknownSkillError(ShouldersError):
    """No skill is served under that name."""


class SkillSet:
    """Skills around one LM; the LM's own name stands for none.

    Args:
        lm: what all of them share.
        index: what readers search; None serves no readers.
        root: the only folder from which skills may be loaded by request; None allows none.
    """

    def __init__(self, lm: FrozenLM, *, index: str | None = None, root: Path | None = None) -> None:
        self.lm, self.root = lm, root
        self._index = index
        # What strangers ask is written to no disk.
        self._encoder = functools.cache(functools.partial(load_encoder, on_disk=False))
        self._lock = threading.Lock()
        plain = SkillConfig(format=TextFormat(separator="", answer_prefix=""))
        # A folder's path is nobody's business but the server's.
        name = Path(lm.name).name if Path(lm.name).exists() else lm.name
        self._served = {name: Served(name, Skill(lm, plain), None, 0)}

    def names(self) -> list[str]:
        """Return every name, the LM's first."""
        return list(self._served)

    def every(self) -> list[Served]:
        """Return everything that is served, the LM first."""
        return list(self._served.values())

    def get(self, name: str) -> Served:
        """Return what is served under a name; raises `UnknownSkillError`."""
        found = self._served.get(name)
        if found is None:
            raise UnknownSkillError(
                f"model '{name[:100]}' is not served; there are {', '.join(self.names())}"
            )
        return found

    def load(self, name: str, folder: Path, instead_of: Served | None = None) -> Served:
        """Load a skill folder under a name.

        `instead_of` is what is served under it so far and goes when the new one is there; what it
        is answering it finishes.

        Raises:
            ShouldersError: the name is taken, or none.
            ArtefactError: the folder is damaged, or bound to another LM.
        """
        if not _NAME.fullmatch(name):
            raise ShouldersError(
                f"'{name[:100]}' is no name for a skill: use letters, digits and . _ - /"
            )
        with self._lock:
            if self._served.get(name) is not instead_of:
                raise ShouldersError(f"a skill named '{name}' is served already")
            answers: Skill | Reader | Ensemble
            answers, _ = load(folder, self.lm, self._encoder)
            if (folder / READER_FILE).is_file() and isinstance(answers, Skill):
                answers = self._reader(folder, answers)
            made = str(provenance_of(folder).get("created", ""))
            served = Served(name, answers, folder, _timestamp(made) or _changed(folder))
            self._served = {**self._served, name: served}
        return served

    def load_inside(self, name: str, path: str) -> Served:
        """Load a folder inside `root`, given relative to it; raises as `load` does."""
        if self.root is None:
            raise ShouldersError("loading skills by request is off: start with --skill-root")
        try:
            folder = (self.root / path).resolve()
            inside = folder.is_relative_to(self.root.resolve()) and saved_in(folder).is_file()
        except (ValueError, OSError):  # what no file system takes: a NUL, a name of kilobytes
            inside = False
        if not inside:
            raise ArtefactError(f"'{path[:200]}' is no skill inside the server's skill folder")
        return self.load(name, folder)

    def unload(self, name: str) -> Served:
        """Stop serving a skill; what is being answered is finished. The LM itself stays."""
        with self._lock:
            found = self.get(name)
            if found.folder is None:
                raise ShouldersError("the LM itself cannot be unloaded")
            self._served = {k: v for k, v in self._served.items() if k != name}
        return found

    def _reader(self, folder: Path, skill: Skill) -> Reader:
        if self._index is None:
            raise ShouldersError(f"{folder.name} is a reader: start with --index")
        artefact: Any = read_reader(folder)
        passages = open_passages(self._index)
        retriever = passages.retriever(artefact.search.retriever)
        contexts = Contexts(retriever, passages, open_reranker(folder), artefact.search.k)
        return Reader(skill, contexts, artefact.reading)


def skill_folders(folder: Path) -> dict[str, Path]:
    """Return the skills and ensembles in a folder of their folders, by name."""
    found = {f.parent for file in (FILE, ENSEMBLE) for f in folder.glob(f"*/{file}")}
    return {one.name: one for one in sorted(found)}


def _changed(folder: Path) -> int:
    return int(saved_in(folder).stat().st_mtime)


def _timestamp(created: str) -> int:
    from datetime import datetime

    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0

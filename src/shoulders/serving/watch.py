"""A watched folder: skills that appear in it are served, those that vanish are not.

What changes is served as it now is, from the moment when it is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from pathlib import Path

from shoulders.errors import ShouldersError
from shoulders.serving.skillset import Served, SkillSet, UnknownSkillError, skill_folders

LOG = logging.getLogger("shoulders.serving")
SECONDS = 1.0  # between two looks
Stamp = frozenset[tuple[Path, int, int, int]]


class Watcher(threading.Thread):
    """Looks at the skill set's root again and again, until it is closed.

    A skill's folder is complete when its `skill.json` (an ensemble's, when its `ensemble.json`) is
    there, which is written last. Each is tried once: one that was refused, or is unloaded by
    request, comes when one of its files has changed (a copy may write them in any order), or it was
    gone. Skills that others have loaded are theirs to unload.
    """

    def __init__(self, skills: SkillSet) -> None:
        super().__init__(name="watch", daemon=True)
        self._skills = skills
        self._closed = threading.Event()
        self._known: dict[str, Stamp] = {}  # what is there, and was served or tried
        self._loaded: dict[str, Served] = {}

    def run(self) -> None:
        """Look until closed."""
        self.look()
        while not self._closed.wait(SECONDS):
            self.look()

    def look(self) -> None:
        """Load what is new and unload what is gone."""
        root = self._skills.root
        assert root is not None  # the caller's to see to
        there = skill_folders(root)
        for name, folder in there.items():
            stamp = _stamp(folder)
            if self._known.get(name) != stamp:
                mine, served = self._loaded.get(name), self._skills.every()
                mine = mine if any(mine is one for one in served) else None
                if mine is not None or name not in self._skills.names():
                    self._load(name, folder, mine)
            self._known[name] = stamp
        self._known = {name: stamp for name, stamp in self._known.items() if name in there}
        # What was unloaded by request is let go; its name may be another's by now.
        every = self._skills.every()
        self._loaded = {k: own for k, own in self._loaded.items() if any(own is e for e in every)}
        for name in self._loaded.keys() - there.keys():
            del self._loaded[name]
            with contextlib.suppress(UnknownSkillError):  # a request has just unloaded it
                self._skills.unload(name)
                LOG.info(json.dumps({"unloaded": name}))

    def _load(self, name: str, folder: Path, before: Served | None) -> None:
        try:
            self._loaded[name] = self._skills.load(name, folder, before)
            LOG.info(json.dumps({"loaded" if before is None else "changed": name}))
        except (ShouldersError, OSError) as error:  # it may vanish while it is read
            LOG.warning(json.dumps({"refused": name, "why": str(error)}))

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()


def _stamp(folder: Path) -> Stamp:
    """Return what tells a skill's files, and its members' ones, from those that stood there."""
    found = set()
    for file in (*folder.glob("*"), *folder.glob("*/*")):
        with contextlib.suppress(OSError):  # gone since
            facts = file.stat()
            found.add((file, facts.st_ino, facts.st_size, facts.st_mtime_ns))
    return frozenset(found)

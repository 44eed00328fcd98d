"""A watched folder: skills that appear in it are served, those that vanish are not."""

from __future__ import annotations

import json
import logging
import threading

from shoulders.errors import ShouldersError
from shoulders.serving.skillset import SkillSet, skill_folders

LOG = logging.getLogger("shoulders.serving")
SECONDS = 1.0  # between two looks


class Watcher(threading.Thread):
    """Looks at the skill set's root again and again, until it is closed.

    A skill's folder is complete when its `skill.json` is there, which is written last.
    """

    def __init__(self, skills: SkillSet) -> None:
        super().__init__(name="watch", daemon=True)
        self._skills = skills
        self._closed = threading.Event()
        self._refused: set[str] = set()

    def run(self) -> None:
        """Look until closed."""
        self.look()
        while not self._closed.wait(SECONDS):
            self.look()

    def look(self) -> None:
        """Load what is new and unload what is gone; a skill that is refused is so once."""
        root = self._skills.root
        assert root is not None  # the caller's to see to
        there = skill_folders(root)
        for name, folder in there.items():
            if name in self._skills.names() or name in self._refused:
                continue
            try:
                self._skills.load(name, folder)
                LOG.info(json.dumps({"loaded": name}))
            except (ShouldersError, OSError) as error:  # it may vanish while it is read
                self._refused.add(name)
                LOG.warning(json.dumps({"refused": name, "why": str(error)}))
        self._refused &= there.keys()
        for served in self._skills.every():
            inside = served.folder is not None and served.folder.parent == root
            if inside and served.name not in there:
                self._skills.unload(served.name)
                LOG.info(json.dumps({"unloaded": served.name}))

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()

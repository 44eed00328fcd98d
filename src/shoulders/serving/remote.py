"""`Remote`: an engine in another process that answers for ours."""

from __future__ import annotations

from typing import Protocol

from shoulders.lm.prompt import Prompt
from shoulders.serving.rows import Entry


class Remote(Protocol):
    """An engine elsewhere, that runs the same LM: see `shoulders.serving.vllm_engine`."""

    tokens: int
    """New tokens since the start."""

    @property
    def running(self) -> int:
        """Samples that it is answering."""
        ...

    def healthy(self) -> bool:
        """Tell whether it can answer."""
        ...

    def takes(self, prompt: Prompt) -> bool:
        """Tell whether it can read a prompt."""
        ...

    def give(self, entry: Entry) -> None:
        """Answer an entry of a single pass."""
        ...

    def close(self) -> None:
        """Break off what is running."""
        ...

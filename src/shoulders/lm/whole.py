"""Whether an LM's weights are those that its configuration speaks of."""

from __future__ import annotations

import re
from typing import Any

from shoulders.errors import LMError


def check_whole(name: str, model: Any, info: Any) -> None:
    """Raise `LMError` where weights are missing, or layers and biases have no place in the LM.

    transformers makes random ones in place of the former, and leaves the latter out.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise LMError(
            f"{name}: its weights are not whole: {len(missing)} are missing, {missing[0]} among "
            "them; copy it again, or name the LM that they belong to"
        )

    def place(key: str) -> str:
        return re.sub(r"\.\d+\.", ".#.", key.replace(".bias", ".weight"))

    places = {place(key) for key in model.state_dict()}
    if left := sorted(key for key in info["unexpected_keys"] if place(key) in places):
        raise LMError(
            f"{name}: its configuration knows nothing of {len(left)} of its weights, {left[0]} "
            "among them; it belongs to another LM"
        )

"""How many positions an LM reads, as far as its configuration says it."""

from __future__ import annotations

import inspect
from typing import Any

from shoulders.errors import LMError

# As architectures name it: most; older GPTs; Bloom; MPT.
_NAMES = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")


def window_of(config: Any, name: str) -> int:
    """Return the window in positions, prompt and tokens together.

    Less than an LM is said to read where a row's states would depend on more than itself: LongRoPE
    turns all keys of a batch by its longest row once that passes the original window, and GPT-Neo's
    local layers count places, pads and other rows' among them.

    Raises `LMError` where the configuration does not say.
    """
    text = config.get_text_config()
    window = next((n for key in _NAMES if (n := getattr(text, key, None))), None)
    if window is None:
        raise LMError(f"{name} ({type(config).__name__}): does not say how many positions it reads")
    rotary = getattr(text, "rope_parameters", None) or {}
    limits = [window]
    if rotary.get("rope_type") == "longrope":
        limits.append(rotary.get("original_max_position_embeddings") or window)
    if has_local_places(config):
        limits.append(text.window_size)
    return int(min(limits))


def has_local_places(config: Any) -> bool:
    """Tell whether some layers see so many places back, whatever stands in them (GPT-Neo)."""
    return "local" in (getattr(config.get_text_config(), "attention_layers", None) or ())


def sliding_window_of(config: Any) -> int | None:
    """Return how many positions sliding layers see; None where every layer sees all.

    Some folders' configurations hold one that their architecture does not know, nor heeds.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    fields = {name for kind in type(text).__mro__ for name in vars(kind).get("__annotations__", {})}
    known = fields | inspect.signature(type(text).__init__).parameters.keys()
    return int(window) if window and "sliding_window" in known else None

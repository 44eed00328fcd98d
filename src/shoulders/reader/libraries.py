"""Libraries that only readers need: imported when they are used, missed by name."""

from __future__ import annotations

import importlib
from typing import Any

from shoulders.errors import ShouldersError, install


def needed(module: str, extra: str = "reader") -> Any:
    """Import `module` of an extra; `ShouldersError` says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name and module.split(".")[0] == error.name.split(".")[0]:
            library = module.split(".")[0]
            raise ShouldersError(f"{library} is not installed; run: {install(extra)}") from None
        raise

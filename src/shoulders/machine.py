"""What a figure depends on besides the code: every result and artefact says it."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from shoulders import __version__


def machine() -> dict[str, Any]:
    """Return what a figure depends on: versions, processor, threads."""
    return {
        "shoulders": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def peak_bytes() -> int:
    """Return the most memory that this process has had resident.

    Not `ru_maxrss` where Linux says better: that begins at what its parent had.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

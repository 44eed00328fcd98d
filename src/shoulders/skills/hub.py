"""Skills on the Hugging Face Hub: a repository that holds what a skill's folder holds."""

from __future__ import annotations

import re
from pathlib import Path

from shoulders.errors import ArtefactError

SCHEME = "hf://"
_NAME = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Of an ensemble its members' too; whatever else lies there, and what training needs, stays there.
FILES = ["*.json", "*.safetensors", "README.md"]
_LEFT = ("checkpoints", "index", "contexts", "candidates", "folds", "parts", "second")
OTHERS = [f"{folder}/*" for name in _LEFT for folder in (name, f"*/{name}")]


def local(name: str) -> str:
    """Return a folder as it is, and for `hf://USER/SKILL[@REVISION]` its copy in the Hub's cache.

    Raises:
        ArtefactError: it is no such name, or the repository cannot be had.
    """
    if not name.startswith(SCHEME):
        return name
    found = _NAME.fullmatch(name)
    if found is None:
        raise ArtefactError(f"{name}: is no skill on the Hub; use hf://USER/SKILL[@REVISION]")
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(found["repo"], revision=found["revision"],
                                     allow_patterns=FILES, ignore_patterns=OTHERS))  # fmt: skip
    except Exception as error:  # no network, no such repository or revision, a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtefactError(f"{name}: cannot be had from the Hub: {reason}") from error


def local_folder(folder: Path | str) -> Path:
    """Return `local` of a folder that programs give as a text or a path."""
    return Path(local(folder) if isinstance(folder, str) else folder)

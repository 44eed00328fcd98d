"""A vLLM server behind a command: `--vllm-url URL [--vllm-api-key-file FILE]`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shoulders.cli.common import stderr
from shoulders.errors import ShouldersError

if TYPE_CHECKING:
    from shoulders.evaluation.evaluate import Answering
    from shoulders.lm.frozen import FrozenLM
    from shoulders.serving.vllm_engine import VllmEngine
    from shoulders.skills.ensemble import Ensemble
    from shoulders.skills.gate import Gated
    from shoulders.skills.skill import Skill


@contextmanager
def through(
    skill: Skill | Ensemble | Gated, url: str | None, key_file: Path | None
) -> Iterator[Answering]:
    """Yield what answers for a skill: itself, or a vLLM server through the gateway's engine."""
    if url is None:
        yield skill
        return
    from shoulders.serving.asking import Asking
    from shoulders.serving.engine import Engine
    from shoulders.skills.skill import Skill

    if not isinstance(skill, Skill):  # gates are refused by the commands
        raise ShouldersError("--vllm-url: an ensemble is answered here; ask one of its members")
    engine = Engine(skill.lm, None, connected(skill.lm, url, key_file))
    try:
        yield Asking(engine, skill)
    finally:
        engine.close(0)


def key_of(file: Path | None, option: str) -> str | None:
    """Return the key that a file holds, None without a file."""
    if file is None:
        return None
    try:  # editors may put a mark before the first letter
        key = file.read_text(encoding="utf-8-sig").strip() if file.is_file() else ""
    except UnicodeDecodeError:
        raise ShouldersError(f"{option} {file}: is not UTF-8") from None
    if not key:
        raise ShouldersError(f"{option} {file}: holds no key")
    return key


def connected(lm: FrozenLM, url: str, key_file: Path | None) -> VllmEngine:
    """Connect to a vLLM server, and tell what was found."""
    from pydantic import ValidationError

    from shoulders.serving.upstream import UpstreamConfig
    from shoulders.serving.vllm_engine import VllmEngine

    # Its line for each request to vLLM would stand beside ours.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        config = UpstreamConfig(url=url, api_key=key_of(key_file, "--vllm-api-key-file"))
    except ValidationError:
        raise ShouldersError(f"--vllm-url {url}: use http://HOST:PORT, without /v1") from None
    remote = VllmEngine(lm, config)
    found = remote.findings
    prefixes = "keys/values too" if found.prefixes else "keys/values skills stay here"
    stderr().print(
        f"vLLM serves {found.model} at {url}: window {found.window}, log-probabilities within "
        f"{found.difference:.1g} of the local LM's; {prefixes}",
        highlight=False,
        markup=False,
    )
    return remote

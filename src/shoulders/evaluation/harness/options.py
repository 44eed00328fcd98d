"""What `--model_args` and a task's `generation_kwargs` say, in our own terms."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import torch

from shoulders.encoders.load import load_encoder
from shoulders.errors import ShouldersError, WindowError
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.load import Precision, load_lm
from shoulders.skills.artefact import load_skill, read_artefact
from shoulders.skills.hub import local
from shoulders.skills.reader_artefact import FILE as READER_FILE
from shoulders.skills.skill import Skill

BASE = "base"
DECODING = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


def opened(name: str, lm: str | None, dtype: Any, device: str | None) -> Skill:
    """Load `base` or a skill's folder, on the LM and in the precision that it was trained with.

    Raises:
        ShouldersError: the folder holds a reader.
        ArtefactError: it is no skill, damaged, or bound to another LM.
        LMError: the LM cannot be loaded.
    """
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        device = None  # the harness asks for CUDA unless it is told otherwise
    if name == BASE:
        return Skill.base(load_lm(lm or "embedded", dtype=dtype or "auto", device=device))
    folder = Path(local(name))
    if (folder / READER_FILE).is_file():
        raise ShouldersError(
            f"{folder}: a reader answers from documents, which the harness's tasks do not bring; "
            "score it with: shoulders eval"
        )
    artefact = read_artefact(folder)
    frozen = load_lm(
        lm or artefact.lm.name,
        dtype=dtype or cast(Precision, artefact.lm_dtype),
        device=device,
        quantize=artefact.lm_quantize,
    )
    skill, _ = load_skill(folder, frozen, functools.cache(load_encoder))
    return skill


def batch_rows(batch_size: int | str, most: int | None) -> int | None:
    """Return how many rows are computed together; None leaves it to their lengths."""
    if str(batch_size).startswith("auto"):
        return None if most is None else int(most)
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ShouldersError(f"batch_size={batch_size}: use auto, or 1 or more")
    return int(batch_size)


def decoding_of(how: dict[str, Any], seed: int) -> DecodingConfig:
    """Return a task's `generation_kwargs`, normalised by the harness, as we decode."""
    unknown = sorted(name for name, value in how.items() if name not in DECODING and value)
    if unknown:
        raise ShouldersError(
            f"generation_kwargs {', '.join(unknown)}: not supported; there are "
            f"{', '.join(sorted(DECODING))}"
        )
    return DecodingConfig(
        max_new_tokens=how["max_gen_toks"],
        temperature=float(how.get("temperature", 1.0)) if how["do_sample"] else 0.0,
        top_p=float(how.get("top_p") or 1.0),
        stop=tuple(stop for stop in how["until"] if stop),
        seed=seed,
    )


def leaving(skill: Skill, answer: int | None = None) -> Skill:
    """Return a skill with over-long inputs cut as its format says, or else to their ends.

    `answer` is what answers may need of the window, where that is not known from them.
    """
    skill = skill.keeping(skill.config.format.keep or "end")
    if answer is None:
        return skill
    most = checked_room(skill.input_room(answer), answer)
    form = skill.config.format.model_copy(update={"max_input_tokens": most})
    config = skill.config.model_copy(update={"format": form})
    return Skill(skill.lm, config, skill.parts, skill.proposals)


def checked_room(room: int, answer: int) -> int:
    """Return how many tokens of a context fit; raises `WindowError` where none does."""
    if room < 1:
        raise WindowError(f"max_gen_toks={answer} leaves no room for a context in the window")
    return room

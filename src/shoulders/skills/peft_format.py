"""Exchange static prompts with PEFT: its PromptTuning folder layout, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from shoulders.errors import ArtefactError
from shoulders.files import atomic_directory
from shoulders.lm.frozen import FrozenLM
from shoulders.prompts.build import build_producer
from shoulders.prompts.interface import Surroundings
from shoulders.prompts.producers import static
from shoulders.skills.config import PassConfig, SkillConfig, TextFormat
from shoulders.skills.parts import Parts
from shoulders.skills.skill import Skill

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
KEY = "prompt_embeddings"


def export_to_peft(skill: Skill, folder: Path | str) -> None:
    """Write a static prompt of input vectors as a PEFT PromptTuning adapter.

    PEFT loads it with `PeftModel.from_pretrained(model, folder)`. The text format (separator,
    answer prefix) is not part of that layout. Raises `ArtefactError` for another producer.
    """
    folder = Path(folder)
    if not isinstance(skill.producer, static.Producer) or len(skill.config.passes) > 1:
        raise ArtefactError("only a static prompt of vectors (kind: static) has a PEFT layout")
    vectors = skill.prompt([""]).vectors[0].detach().cpu().contiguous()
    config = skill.lm.model.config
    described = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": skill.lm.name,
        "inference_mode": True,
        "num_virtual_tokens": vectors.shape[0],
        "token_dim": vectors.shape[1],
        "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "prompt_tuning_init": "RANDOM",
    }
    with atomic_directory(folder) as temporary:
        save_file({KEY: vectors}, temporary / TENSORS)
        (temporary / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def import_from_peft(folder: Path | str, lm: FrozenLM, form: TextFormat | None = None) -> Skill:
    """Read a PEFT PromptTuning adapter as a skill with a static prompt.

    `form` should be the text format that it was trained with; by default there is no
    separator and no answer prefix. Raises `ArtefactError` when the folder is not such an
    adapter, or is for a LM of another width.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        vectors = load_file(folder / TENSORS)[KEY]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtefactError(f"{folder}: not a PEFT PromptTuning adapter: {error}") from error
    if not isinstance(described, dict):
        raise ArtefactError(f"{folder / CONFIG}: not a PEFT adapter's: holds no object")
    if described.get("peft_type") != "PROMPT_TUNING":
        raise ArtefactError(f"{folder}: PEFT type {described.get('peft_type')}, not PROMPT_TUNING")
    if vectors.dim() != 2 or vectors.shape[1] != lm.hidden_size:
        raise ArtefactError(
            f"{folder}: prompt {tuple(vectors.shape)}, but {lm.name} has width {lm.hidden_size}"
        )
    if not len(vectors) or not bool(torch.isfinite(vectors).all()):
        raise ArtefactError(f"{folder / TENSORS}: its prompt is empty, or holds NaN or infinity")

    def no_encoder(name: str) -> None:
        raise ArtefactError(f"a static prompt needs no encoder, asked for {name}")

    prompt = {"kind": "static", "length": len(vectors)}
    form = form or TextFormat(separator="", answer_prefix="")
    config = SkillConfig(passes=(PassConfig(prompt=prompt),), format=form)
    producer = build_producer(prompt, Surroundings(lm, no_encoder))  # type: ignore[arg-type]
    scale = torch.tensor(lm.embedding_scale)
    producer.load_state_dict({"base": vectors.float() / scale, "scale": scale})
    return Skill(lm, config, Parts((), producer, cast(nn.Module, producer)))

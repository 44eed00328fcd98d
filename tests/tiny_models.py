"""Tiny random models on disk, as plain functions: what a test of files and processes needs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

END = "<|end|>"
WINDOW = 160
_CORPUS = (
    "the capital of france is paris and the capital of spain is madrid",
    "answer the question with a short answer please",
    "write the number two as a word and the number three as a word",
)
STATIC = {"kind": "static", "length": 4}


def tiny_tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 320 tokens; another `extra` text, another one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_CORPUS, extra], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def save_tiny_lm(
    folder: Path,
    *,
    seed: int = 0,
    tokenizer_extra: str = "",
    window: int = WINDOW,
    endless: bool = False,
    layers: int = 2,
) -> Path:
    """Save a random Llama as a Hugging Face folder; deterministic in `seed`.

    The end token of an `endless` one is never the likeliest: greedy answers are as long as may be.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=330,  # more rows than tokens, as many LMs have
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.3,  # sharp enough that greedy answers depend on the input
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    if endless:
        with torch.no_grad():
            model.lm_head.weight[config.eos_token_id] = 0
    model.save_pretrained(folder)
    tiny_tokenizer(tokenizer_extra).save_pretrained(folder)
    torch.random.set_rng_state(state)
    return folder


def save_tiny_encoder(folder: Path, *, seed: int = 0) -> Path:
    """Save a random BERT of one layer as a Hugging Face folder; deterministic in `seed`."""
    state = torch.random.get_rng_state()
    torch.manual_seed(100 + seed)
    config = BertConfig(
        vocab_size=330,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    torch.random.set_rng_state(state)
    return folder


def prompt_spec(kind: str, encoder: Path, length: int = 4) -> dict[str, Any]:
    """Return a small `prompt` of a recipe for any producer, with `encoder` where it reads one."""
    from shoulders.prompts.build import producer_config

    spec: dict[str, Any] = {"kind": kind, "length": length}
    if "generator" in type(producer_config(spec)).model_fields:
        spec["generator"] = {"encoder": str(encoder), "width": 16, "layers": 1, "heads": 2}
    return spec


def rows(task: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Return `count` rows of a task, with inputs of different lengths."""
    return [
        {
            "task": task,
            "input": f"{task} question {i} " + "and so on " * (i % 4),
            "targets": [("paris", "madrid", "two words", "no")[i % 4]],
        }
        for i in range(first, first + count)
    ]


def write_jsonl(path: Path, values: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    return path


def recipe_values(
    lm: Path, folder: Path, prompt: Mapping[str, Any] = STATIC, **training: Any
) -> dict[str, Any]:
    """Return a recipe on two small tasks, whose files it writes into `folder`."""
    train = write_jsonl(folder / "train.jsonl", [*rows("north", 9), *rows("south", 5)])
    held = write_jsonl(folder / "held.jsonl", [*rows("north", 3, 50), *rows("south", 3, 50)])
    return {
        "lm": {"name": str(lm), "dtype": "float32"},
        "skill": {"passes": [{"prompt": dict(prompt)}]},
        "data": {"train": [str(train)], "validation": [str(held)]},
        "training": {
            "steps": 6,
            "rows_per_step": 4,
            "micro_tokens": 64,
            "optimizer": {"kind": "adamw", "lr": 0.01},
            "warmup_steps": 2,
            "validate_every": 3,
            "save_every": 2,
            **training,
        },
    }


def write_recipe(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a recipe as YAML."""
    path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    return path


def environment(cache: Path) -> dict[str, str]:
    """Return the variables of a subprocess: offline, one thread, a cache of its own."""
    return {
        **os.environ,
        "SHOULDERS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }

"""Rivals of the frozen reader: the same LM fine-tuned, wholly or with LoRA, on the same contexts.

    python comparisons/reader_rivals.py --lm DIR --train train.jsonl --test test.jsonl \
        --variant lora --examples 960 --out predictions.json

Started by benchmarks/nq_rivals.py. Rows are `{"ids": [...], "answer_ids": [[...], ...]}`: the
tokens that the frozen reader was trained on and is asked with. Trains with transformers' Trainer
(PEFT for LoRA) on the first `--examples` rows of the file, padded batches of similar length, then
answers the test rows greedily with `generate`, and notes the time of both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)


def main() -> None:
    """Train, answer, and write both with their times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--variant", choices=("lora", "full"), required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16, help="rows answered together")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.lm, padding_side="left")
    torch.manual_seed(options.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(options.lm, dtype=torch.float32)
    if options.variant == "lora":
        config = LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    started = time.perf_counter()
    losses = train(model, tokenizer, read(options.train), options)
    seconds = time.perf_counter() - started
    if options.variant == "lora":
        model = model.merge_and_unload()  # what its users do before they serve it
    answers, answer_seconds = answer(model.eval(), tokenizer, read(options.test), options)
    result = {
        "variant": options.variant,
        "rank": options.rank if options.variant == "lora" else None,
        "examples": options.examples,
        "lr": options.lr,
        "seed": options.seed,
        "trained_parameters": trained,
        "training_seconds": seconds,
        "losses": losses,
        "answer_seconds": answer_seconds,
        "answers": answers,
    }
    options.out.write_text(json.dumps(result), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], options: argparse.Namespace
) -> list[float]:
    """Train on the first `examples` rows, several times over them where that is more; the losses.

    Of several right answers the first is taught.
    """
    examples = [features(rows[i % len(rows)]) for i in range(options.examples)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.rows_per_step,
            num_train_epochs=1,
            learning_rate=options.lr,
            warmup_steps=max(1, options.examples // options.rows_per_step // 10),
            train_sampling_strategy="group_by_length",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            seed=options.seed,
        )
        trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), examples)
        trainer.train()
    return [e["loss"] for e in trainer.state.log_history if "loss" in e]


def features(row: dict[str, Any]) -> dict[str, list[int]]:
    """Return ids and labels of a row: the loss counts its answer and the end token."""
    ids, answer = row["ids"], row["answer_ids"][0]
    return {
        "input_ids": ids + answer,
        "attention_mask": [1] * len(ids + answer),
        "labels": [-100] * len(ids) + answer,
    }


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], options: argparse.Namespace
) -> tuple[list[str], float]:
    """Answer every row greedily, in batches of similar length; also return the seconds."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["ids"]))
    answers: dict[int, str] = {}
    started = time.perf_counter()
    for at in range(0, len(order), options.batch):
        indices = order[at : at + options.batch]
        batch = tokenizer.pad({"input_ids": [rows[i]["ids"] for i in indices]}, return_tensors="pt")
        out = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        for i, ids in zip(indices, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return [answers[i] for i in range(len(rows))], time.perf_counter() - started


if __name__ == "__main__":
    main()

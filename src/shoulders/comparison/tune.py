"""`python -m shoulders.comparison.tune DIR`: tune one copy of an LM, LoRA or wholly.

Reads `settings.json`, `train.jsonl` (rows of tokens, in the order of training) and
`validation.jsonl` of the folder; trains with transformers' Trainer (PEFT for LoRA) as their
documentation shows it; writes `tuned.json` and, where asked, the merged weights. SIGTERM ends it
with the step it is in and a checkpoint, from which the next start goes on. Started by
`shoulders.comparison.tuned`; the memory it takes is given back when it ends.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from shoulders.comparison.watch import Watch
from shoulders.files import atomic_directory, sha256_of_file, write_json
from shoulders.training.checkpoint import FOLDER
from shoulders.training.configs import OptimizerConfig, TrainingConfig
from shoulders.training.optimizer import rate_factor

SHORT = 512  # tokens


def main() -> None:
    """Train what the folder describes."""
    begun = time.perf_counter()
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    revision = settings["revision"] or "main"
    tokenizer = AutoTokenizer.from_pretrained(settings["lm"], revision=revision)
    if tokenizer.pad_token is None:  # GPT-2 has none; what pads hold is masked
        tokenizer.pad_token = tokenizer.eos_token
    rows, checked = read(folder / "train.jsonl"), read(folder / "validation.jsonl")
    torch.manual_seed(settings["seed"])
    # Where bfloat16 is faster: LoRA on weights in it, as its users do; whole tuning keeps float32
    # weights and computes in it (autocast). What is trained is float32 in both.
    narrow = settings["bfloat16"] and settings["rank"] is not None
    model: Any = AutoModelForCausalLM.from_pretrained(
        settings["lm"],
        revision=revision,
        dtype=torch.bfloat16 if narrow else torch.float32,
        attn_implementation=attention_for(rows, cpu=settings["cpu"]),
    )
    if settings["rank"] is not None:
        model = with_lora(model, settings["rank"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    watch = Watch(model, checked, settings["validate_every"])
    told = {**settings, "rows": sha256_of_file(folder / "train.jsonl"), "torch": torch.__version__}
    watch.keep(folder, told)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; we are told apart
    signal.signal(signal.SIGTERM, lambda *_: watch.stop())
    fitted(model, tokenizer, rows, settings, folder, watch)
    if watch.stopped:
        return
    diverged = not all(math.isfinite(loss) for _, loss in watch.validations)
    if settings["weights"] and not diverged:
        if settings["rank"] is not None:
            model = model.float().merge_and_unload()  # what its users do before they serve it
        with atomic_directory(folder / settings["weights"]) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    total = time.perf_counter() - begun
    write_json(
        folder / "tuned.json",
        {
            "trained_parameters": trained,
            "seconds": watch.seconds,
            "besides_seconds": total - watch.seconds,
            # JSON has no number for a loss that is none.
            "validations": [
                (step, loss if math.isfinite(loss) else None) for step, loss in watch.validations
            ],
        },
    )
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def attention_for(rows: list[dict[str, Any]], *, cpu: bool) -> str:
    """Return which of transformers' own ways to attend suits rows of tokens.

    On CPUs the plain one is faster backwards while rows are short; for long ones it would keep
    every pair of positions.
    """
    longest = max(len(row["ids"] + row["answer_ids"]) for row in rows)
    return "eager" if longest <= SHORT and cpu else "sdpa"


def with_lora(model: Any, rank: int) -> Any:
    """Return the model with LoRA on every product of its layers; alpha is twice the rank."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def fitted(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    folder: Path,
    watch: Watch,
) -> None:
    """Train once over the rows, in the order of the steps, from where a checkpoint stands.

    Rows of a step that are of like length are computed together and their gradients added up, so
    that few pads are computed; the step is the same.
    """
    count = settings["rows_per_step"]
    together = rows_together(count)
    features = [
        {
            "input_ids": row["ids"] + row["answer_ids"],
            "attention_mask": [1] * len(row["ids"] + row["answer_ids"]),
            "labels": [-100] * len(row["ids"]) + row["answer_ids"],
        }
        for row in by_length(rows[watch.step * count :], count)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=together,
        gradient_accumulation_steps=count // together,
        num_train_epochs=1,
        learning_rate=settings["lr"],
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=settings["bfloat16"],
        use_cpu=settings["cpu"],
        dataloader_pin_memory=False,
        seed=settings["seed"],
    )
    pad = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(
        model,
        arguments,
        lambda rows: with_answers_kept(pad(rows)),
        features,
        callbacks=[watch],
        compute_loss_func=answer_loss,
    )
    # The frozen methods' schedule: transformers' own begins at a rate of 0, so that of a few steps
    # the first would teach nothing.
    schedule = TrainingConfig(
        steps=len(rows) // count,
        rows_per_step=count,
        optimizer=OptimizerConfig(lr=settings["lr"]),
        warmup_steps=settings["warmup_steps"],
    )
    trainer.create_optimizer()
    watch.restore(trainer.optimizer)
    begun = watch.step
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: rate_factor(begun + step, schedule)
    )
    trainer.train()


def with_answers_kept(batch: Any) -> Any:
    """Ask for logits from the first answer's beginning on: those before it have no loss."""
    answers = (batch["labels"] != -100).any(0).nonzero()
    width = batch["labels"].shape[1]
    batch["logits_to_keep"] = torch.arange(max(0, int(answers[0]) - 1), width)
    return batch


def answer_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """Return nats per answer token of the whole step, as the model's own loss has them.

    `outputs.logits` are `[b, kept, vocabulary]` of the last positions, labels `[b, s]`, -100 where
    nothing is learned; `num_items_in_batch` counts the answer tokens of all parts of the step.
    """
    logits = outputs.logits
    targets = labels[:, -(logits.shape[1] - 1) :]
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum"
    )
    return total / num_items_in_batch


def rows_together(rows_per_step: int) -> int:
    """Return how many of a step's rows are computed at once: a quarter, where that is whole."""
    return rows_per_step // 4 if rows_per_step % 4 == 0 else rows_per_step


def by_length(rows: list[dict[str, Any]], rows_per_step: int) -> list[dict[str, Any]]:
    """Return the rows of each step sorted by their length; every step keeps its rows."""
    steps = (rows[i : i + rows_per_step] for i in range(0, len(rows), rows_per_step))
    return [
        row
        for step in steps
        for row in sorted(step, key=lambda row: len(row["ids"]) + len(row["answer_ids"]))
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()

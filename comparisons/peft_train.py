"""PEFT's side of `shoulders bench train`: prompt tuning or LoRA through transformers' Trainer.

Started by that command: trains once over the rows, after one step of warming up, and prints one
JSON line. As PEFT's documentation shows it: the tokenized row with labels on its answer, padded by
`DataCollatorForSeq2Seq`, `Trainer` with AdamW.

    default     prompt tuning, float32, batches as they come
    grouped     prompt tuning, float32, rows of similar length together
    bf16        prompt tuning, bfloat16, rows of similar length together
    lora        LoRA r16 on every linear layer, --dtype, rows of similar length together

With --prompt-ids it is prompt tuning from the embeddings of these tokens, on the rows in the order
in which they stand (benchmarks/curves.py draws its loss beside ours).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PromptTuningConfig, PromptTuningInit, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from memory import peak_bytes


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--rows", required=True, help='JSONL with "text", "answer"')
    parser.add_argument("--variant", choices=("default", "grouped", "bf16", "lora"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--length", type=int, required=True, help="prompt positions")
    parser.add_argument("--rows-per-step", type=int, required=True)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--prompt-ids", help="comma-separated ids that the prompt starts from")
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--beta2", type=float, default=0.999)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.lm)
    with Path(options.rows).open(encoding="utf-8") as file:
        rows = [features(json.loads(line), tokenizer) for line in file]
    bf16 = options.variant == "bf16" or options.dtype == "bfloat16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    train(options, rows, tokenizer, dtype, warm_up=True)
    print(json.dumps(train(options, rows, tokenizer, dtype)))


def train(
    options: argparse.Namespace,
    rows: list[dict[str, list[int]]],
    tokenizer: Any,
    dtype: torch.dtype,
    warm_up: bool = False,
) -> dict[str, Any]:
    """Train over all rows once (to warm up: one step) and return the figures."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(options.lm, dtype=dtype)
    model = get_peft_model(base, config_of(options))
    if options.prompt_ids:
        ids = torch.tensor([int(i) for i in options.prompt_ids.split(",")])
        with torch.no_grad():
            embedded = base.get_input_embeddings()(ids)
            model.prompt_encoder["default"].embedding.weight.copy_(embedded)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.rows_per_step,
            num_train_epochs=1,
            max_steps=1 if warm_up else -1,
            learning_rate=options.lr,
            adam_beta2=options.beta2,
            warmup_steps=options.warmup_steps,
            max_grad_norm=options.clip,
            train_sampling_strategy=strategy(options),
            bf16=dtype == torch.bfloat16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        )
        collate = DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(model, arguments, collate, rows, callbacks=[clock])
        trainer.train()
    return {
        "seconds": clock.end - clock.start,
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_rss_bytes": peak_bytes(),
    }


def strategy(options: argparse.Namespace) -> str:
    """Return the order of rows, in Trainer's words."""
    if options.prompt_ids:
        return "sequential"
    return "random" if options.variant == "default" else "group_by_length"


def features(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Return ids and labels of a row: the loss counts its answer and the end token.

    Rows that bring their tokens (`ids`, `answer_ids`) keep them.
    """
    text = row.get("ids") or tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    answer = row.get("answer_ids")
    if answer is None:
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
    return {
        "input_ids": text + answer,
        "attention_mask": [1] * len(text + answer),
        "labels": [-100] * len(text) + answer,
    }


def config_of(options: argparse.Namespace) -> LoraConfig | PromptTuningConfig:
    """Return PEFT's configuration of the variant."""
    if options.variant == "lora":
        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.length,
        prompt_tuning_init=PromptTuningInit.RANDOM,
        tokenizer_name_or_path=options.lm,
    )


class Clock(TrainerCallback):
    """Times the steps only: from the first one's beginning to the last one's end."""

    start = end = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note when the first step begins."""
        self.start = self.start or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note when a step, its optimizer's too, has ended."""
        self.end = time.perf_counter()


if __name__ == "__main__":
    main()

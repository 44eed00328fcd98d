"""PEFT's side of benchmarks/serve.py: several adapters on one LM, one active at a time.

    python comparisons/peft_serve.py --lm DIR --rows rows.jsonl --new-tokens 64 --length 10

Rows are `{"ids": [...], "adapter": 0}`. Every adapter's rows are one left-padded batch of
`generate`, after `set_adapter`; half of the adapters are prompt tuning, half prefix tuning.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Generate for all rows, after one small batch to warm up, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.lm, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(options.lm, dtype=getattr(torch, options.dtype))
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    adapters = sorted({row["adapter"] for row in rows})
    # PEFT mixes no prompts and prefixes in one model: one for each kind, around the same LM.
    models: dict[Any, Any] = {}
    for number in adapters:
        kind, config = (
            kind_of(number),
            kind_of(number)(task_type="CAUSAL_LM", num_virtual_tokens=options.length),
        )
        if kind not in models:
            models[kind] = get_peft_model(base, config, adapter_name=str(number)).eval()
        else:
            models[kind].add_adapter(str(number), config)

    @torch.no_grad()
    def generate(number: int, several: list[dict[str, Any]], new: int) -> int:
        model = models[kind_of(number)]
        model.set_adapter(str(number))
        batch = tokenizer.pad({"input_ids": [row["ids"] for row in several]}, return_tensors="pt")
        out = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        return len(out) * new

    generate(adapters[0], rows[:2], 2)
    started = time.perf_counter()
    tokens = sum(
        generate(number, [r for r in rows if r["adapter"] == number], options.new_tokens)
        for number in adapters
    )
    print(json.dumps({"seconds": time.perf_counter() - started, "new_tokens": tokens}))


def kind_of(number: int) -> Any:
    """Return a prompt or a prefix, by turns; values are random, cost does not depend on them."""
    return PromptTuningConfig if number % 2 == 0 else PrefixTuningConfig


if __name__ == "__main__":
    main()

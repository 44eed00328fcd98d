"""transformers' side of `shoulders bench generate`: `generate` at a batch size, greedy.

The same static prompt as ours (the embeddings of its initial text, of the same length) stands
before every row, through `inputs_embeds`; rows are sorted by length and padded on the left.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory import peak_bytes


def main() -> None:
    """Generate for all rows, after one small batch to warm up, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--prompt-ids", required=True, help="comma-separated token ids")
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.lm, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.lm, dtype=getattr(torch, options.dtype))
    embed = model.get_input_embeddings()
    prompt = embed(torch.tensor([int(i) for i in options.prompt_ids.split(",")]))
    lines = options.rows.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["ids"] for line in lines]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))

    @torch.no_grad()
    def generate(indices: list[int]) -> list[list[int]]:
        width = max(len(rows[i]) for i in indices)
        pad = tokenizer.pad_token_id or tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (width - len(rows[i])) + rows[i] for i in indices])
        real = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in indices])
        # The prompt stands before each row's own tokens; pads stand before both.
        embedded = torch.zeros(len(indices), len(prompt) + width, prompt.shape[1]).to(prompt)
        mask = torch.zeros(len(indices), len(prompt) + width, dtype=torch.long)
        for j, i in enumerate(indices):
            start = width - len(rows[i])
            embedded[j, start : start + len(prompt)] = prompt
            embedded[j, start + len(prompt) :] = embed(ids[j, start:])
            mask[j, start:] = 1
        assert int(real.sum()) + len(prompt) * len(indices) == int(mask.sum())
        out = model.generate(
            inputs_embeds=embedded,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,
            pad_token_id=pad,
        )
        return out.tolist()

    generate(order[:4])
    started = time.perf_counter()
    answers: dict[int, list[int]] = {}
    for at in range(0, len(order), options.batch):
        indices = order[at : at + options.batch]
        answers.update(zip(indices, generate(indices), strict=True))
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "rows": len(rows),
        "new_tokens": sum(len(a) for a in answers.values()),
        "token_ids": [answers[i] for i in range(len(rows))],
        "peak_rss_bytes": peak_bytes(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""vLLM's side of `bench generate` and of benchmarks/serve.py: offline generation, greedy.

Runs in an environment of its own (comparisons/requirements-vllm.txt). All rows are queued at once;
the prompt stands before each row, as embeddings or (the bare LM with as many tokens) as token ids.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from memory import peak_bytes

# vLLM reads these when it is imported: GiB of cache, and no worker process of its own, so that
# the peak of memory is this process's.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# All cores: by itself it leaves one for a scheduler, half of a small machine.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def main() -> None:
    """Generate for all rows, after a few to warm up, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--prompt-ids", required=True, help="comma-separated token ids")
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--ids", action="store_true", help="token ids in place of embeddings")
    parser.add_argument("--repeat", type=int, default=1, help="times; the median counts")
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    prompt = [int(i) for i in options.prompt_ids.split(",")]
    lines = options.rows.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["ids"] for line in lines]
    if options.ids:
        asked = [{"prompt_token_ids": prompt + ids} for ids in rows]
    else:
        dtype = getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_pretrained(options.lm, dtype=dtype)
        embed = model.get_input_embeddings()
        with torch.no_grad():
            asked = [{"prompt_embeds": embed(torch.tensor(prompt + ids))} for ids in rows]
        del model
    new = options.new_tokens
    window = len(prompt) + max(map(len, rows)) + new
    llm = LLM(
        options.lm,
        dtype=options.dtype,
        enable_prompt_embeds=not options.ids,
        # Rows that come again must be read again.
        enable_prefix_caching=False,
        max_model_len=window,
    )
    sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new)
    llm.generate(asked[:8], sampling, use_tqdm=False)
    seconds = []
    for _ in range(options.repeat):
        started = time.perf_counter()
        answers = llm.generate(asked, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    result = {
        "seconds": statistics.median(seconds),
        "every": seconds,
        "rows": len(rows),
        "new_tokens": sum(map(len, tokens)),
        "token_ids": tokens,
        "peak_rss_bytes": peak_bytes(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

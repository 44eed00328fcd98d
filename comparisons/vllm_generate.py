"""vLLM's side of `shoulders bench generate`: offline generation from prompt embeddings, greedy.

Runs in an environment of its own (comparisons/requirements-vllm.txt). All rows are queued at once;
the prompt's embeddings stand before each row's own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

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
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.lm, dtype=dtype)
    prompt = [int(i) for i in options.prompt_ids.split(",")]
    lines = options.rows.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["ids"] for line in lines]
    with torch.no_grad():
        embed = model.get_input_embeddings()
        embedded = [embed(torch.tensor(prompt + ids)) for ids in rows]
    del model
    new = options.new_tokens
    window = max(len(e) for e in embedded) + new
    llm = LLM(options.lm, dtype=options.dtype, enable_prompt_embeds=True, max_model_len=window)
    sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new)
    llm.generate([{"prompt_embeds": e} for e in embedded[:8]], sampling, use_tqdm=False)
    started = time.perf_counter()
    answers = llm.generate([{"prompt_embeds": e} for e in embedded], sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    result = {
        "seconds": seconds,
        "rows": len(rows),
        "new_tokens": sum(map(len, tokens)),
        "token_ids": tokens,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

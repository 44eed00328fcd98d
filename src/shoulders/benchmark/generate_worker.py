"""One measurement of our generation: `python -m shoulders.benchmark.generate_worker`."""

from __future__ import annotations

import time

from shoulders.benchmark.contender import read_rows
from shoulders.benchmark.limits import generation_operations
from shoulders.benchmark.worker import arguments, new_skill, report
from shoulders.lm.decode import DecodingConfig


def main() -> None:
    """Generate for all rows, after a few to warm up, and print the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--new-tokens", type=int, required=True)
    options = parser.parse_args()

    skill = new_skill(options)
    texts = [row["input"] for row in read_rows(options.rows)]
    new = options.new_tokens
    decoding = DecodingConfig(max_new_tokens=new, min_new_tokens=new)
    skill.generate(texts[:8], decoding)
    started = time.perf_counter()
    answers = skill.generate(texts, decoding)
    seconds = time.perf_counter() - started
    prompt = skill.prompt(texts[:1])  # of a static one keys/values are kept: nothing is read of it
    own = 0 if prompt.shared else prompt.vectors.shape[1]
    read = sum(own + len(ids) for ids in skill.input_ids(texts))
    written = sum(len(several[0].token_ids) for several in answers)
    report(
        {
            "seconds": seconds,
            "rows": len(texts),
            "new_tokens": written,
            "operations": generation_operations(skill.lm, len(texts), read, written),
            "token_ids": [several[0].token_ids for several in answers],
        }
    )


if __name__ == "__main__":
    main()

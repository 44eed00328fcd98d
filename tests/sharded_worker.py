"""What each of two processes does in `test_sharded`: `torchrun sharded_worker.py FOLDER`.

Writes what it found to `FOLDER/rank-N.json`; the test compares it with an unsharded LM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from shoulders.errors import InterruptedTraining, LMError, TrainingError
from shoulders.lm.decode import DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.lm.shard import decoder_layers, held
from shoulders.training import fit
from shoulders.training.processes import Processes
from shoulders.training.recipe import read_recipe
from shoulders.training.run import run_recipe

TEXT = "the capital of france"
# Passes of each process; they differ, and nobody may wait for ever.
TOKENS, BACKWARDS = (3, 9), (3, 1)


def of_architecture(path: Path, rank: int) -> dict[str, Any]:
    """Return what this process finds about one LM, with passes that the other does not run."""
    lm = load_lm(str(path), dtype="float32", shard=True)
    found: dict[str, Any] = {"fused": lm.blocks is not None, "held": lm.shards.held}
    found |= {"bytes": stored_bytes(lm), "layers": lm.prefix_shape.layers}
    found |= {"fingerprint": lm.fingerprint, "digest": lm.digest()}
    found["tokens"] = answer(lm, TOKENS[rank])
    lm.settle()
    for _ in range(BACKWARDS[rank]):
        found["gradient"] = gradient(lm)
    lm.settle()
    found["out_of_step"] = out_of_step(lm, rank)
    found["beside_last"] = beside_last(lm)
    return found | {"bytes_after": stored_bytes(lm)}


def stored_bytes(lm: FrozenLM) -> int:
    """Return the bytes behind the decoder layers' parameters in this process."""
    layers = decoder_layers(lm.model).parameters()
    return sum(held(p).untyped_storage().nbytes() for p in layers)


def beside_last(lm: FrozenLM) -> int:
    """Return how many parameters of the other layers are held while the last one runs."""
    *others, last = decoder_layers(lm.model)
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(sum(held(p).numel() for layer in others for p in layer.parameters()))

    hook = last.register_forward_hook(look)
    answer(lm, 1)
    hook.remove()
    return seen[0]


def gradient(lm: FrozenLM) -> list[float]:
    """Return the gradient of a loss on `TEXT` with respect to its first embedding."""
    ids = torch.tensor(lm.tokenize([TEXT]))
    x = lm.embed(ids).requires_grad_()
    positions = torch.arange(ids.shape[1])[None]
    hidden = lm.hidden(x, torch.ones_like(ids), positions)
    loss = lm.logits(hidden[0]).log_softmax(-1)[:, 5].sum()
    return torch.autograd.grad(loss, x)[0][0, 0].tolist()


def answer(lm: FrozenLM, tokens: int) -> list[int]:
    """Return `tokens` greedy tokens after `TEXT`."""
    decoding = DecodingConfig(max_new_tokens=tokens, min_new_tokens=tokens)
    return generate(lm, Prompt.empty(1), lm.tokenize([TEXT]), decoding)[0][0].token_ids


def refused(function: Any, *arguments: Any, **named: Any) -> str:
    """Return the message with which a call is refused."""
    try:
        function(*arguments, **named)
    except (LMError, TrainingError, RuntimeError) as error:
        return str(error)
    return ""


def out_of_step(lm: FrozenLM, rank: int) -> str:
    """Return what happens when one process wants a backward pass and the other none."""
    with torch.set_grad_enabled(rank == 0):
        return refused(lm.hidden, lm.embed(torch.ones(1, 1, dtype=torch.long)), *[None] * 2)


def stop_at_first_save(rank: int) -> None:
    """Let process 1 get Ctrl-C as soon as a checkpoint is written, as seen by process 0."""
    real = fit.save_checkpoint

    def save(*arguments: Any) -> None:
        real(*arguments)
        fit.save_checkpoint = real
        os.kill(os.getpid(), signal.SIGINT)

    if rank == 0:
        fit.save_checkpoint = save


def main(folder: Path) -> None:
    """Do everything, in the same order in both processes."""
    processes = Processes.started()
    rank = processes.rank
    found: dict[str, Any] = {
        path.name: of_architecture(path, rank) for path in sorted(folder.glob("tiny-*"))
    }
    found["disagreement"] = refused(processes.agree, "rank", rank)
    found["int8"] = refused(load_lm, str(folder / "lm"), dtype="int8", shard=True)

    recipe = read_recipe(folder / "sharded.yaml")
    run_recipe(recipe, folder / "straight")
    stop_at_first_save(rank)
    try:
        run_recipe(recipe, folder / "stopped")
    except InterruptedTraining as error:
        found["interrupted"] = str(error)
    run_recipe(recipe, folder / "stopped", resume=True)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

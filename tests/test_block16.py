"""bfloat16 layers in the processor's tiles, or widened: against the same weights in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoulders.lm import block, fused
from shoulders.lm.block16 import Block16
from shoulders.lm.block32 import Block32
from shoulders.lm.decode import DecodingConfig, generate
from shoulders.lm.factors import Factors
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.kernels import available
from shoulders.lm.prompt import Prompt
from shoulders.lm.reading import begun
from shoulders.lm.states import states
from shoulders.lm.updates import Matrices
from shoulders.training.objective import Example, answer_losses

ROWS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 6]]
EXAMPLES = [Example("", row, [20 + i, 30, 0], "task") for i, row in enumerate(ROWS)]


@pytest.fixture(params=["tiles", "wide", "plain"])
def lm(
    request: pytest.FixtureRequest,
    fresh_lm: Callable[..., FrozenLM],
    monkeypatch: pytest.MonkeyPatch,
) -> FrozenLM:
    """With AMX, with AVX2 alone, and where there is no compiler and bfloat16 is slow."""
    compiled, way = available(), request.param
    if way == "tiles" and (compiled is None or compiled.tiles is None):
        pytest.skip("this processor has no AMX")
    if way == "wide":
        request.getfixturevalue("avx2_alone")
    if way == "plain":
        monkeypatch.setattr(fused, "available", lambda: None)
        monkeypatch.setattr(fused, "fast_bfloat16", lambda _: False)
    found = fresh_lm("llama64", dtype="bfloat16")
    assert found.blocks is not None
    assert found.blocks.dtype == torch.float32
    assert isinstance(found.blocks._functions, {"tiles": Block16, "wide": Block32}.get(way, object))
    return found


@pytest.fixture
def tiled(lm: FrozenLM) -> FrozenLM:
    """What all layers are read with in one call."""
    if lm.blocks is None or lm.blocks._whole is None:
        pytest.skip("layers are read one by one")
    return lm


def prompt_for(lm: FrozenLM, rows: int) -> Prompt:
    """Return random vectors and prefixes, leaves that take gradients."""
    random, shape = torch.Generator().manual_seed(0), lm.prefix_shape
    size = rows, shape.layers, 2, shape.kv_heads, 3, shape.head_dim
    vectors = lm.embedding_scale * torch.randn(rows, 2, lm.hidden_size, generator=random)
    keys_values = 0.3 * torch.randn(size, generator=random)
    return Prompt(
        vectors.requires_grad_(True),
        torch.ones(rows, 2, dtype=torch.bool),
        keys_values.requires_grad_(True),
        torch.ones(rows, 3, dtype=torch.bool),
    )


def figures(lm: FrozenLM, *, recompute: bool = False) -> list[Tensor]:
    prompt = prompt_for(lm, len(ROWS))
    losses = answer_losses(lm, prompt, EXAMPLES, recompute=recompute)
    leaves = torch.autograd.grad(losses.sum(), [prompt.vectors, prompt.keys_values])
    return [losses.detach(), *leaves]


def test_losses_and_gradients_are_near_those_of_float32(lm: FrozenLM) -> None:
    mine = figures(lm)
    wide = FrozenLM(lm.model.float(), lm.tokenizer, lm.name)  # the same weights
    for one, other in zip(mine, figures(wide), strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.03


def test_recomputed_gradients_are_bit_equal(lm: FrozenLM) -> None:
    for plain, again in zip(figures(lm), figures(lm, recompute=True), strict=True):
        assert torch.equal(plain, again)


def test_a_row_is_what_it_is_alone(lm: FrozenLM) -> None:
    prompt = prompt_for(lm, len(ROWS))
    together = answer_losses(lm, prompt, EXAMPLES).view(len(ROWS), -1)
    for row, example in enumerate(EXAMPLES):
        alone = answer_losses(lm, prompt.select([row]), [example])
        # torch's float32 products may sum in another order beside other rows.
        gap = 1e-5 if lm.blocks is not None and lm.blocks._functions is block else 0.0
        assert float((alone - together[row]).detach().abs().max()) <= gap


def test_cached_answers_equal_a_loop_without_a_cache(lm: FrozenLM) -> None:
    with torch.no_grad():
        prompt = prompt_for(lm, len(ROWS))
        answers = generate(lm, prompt, ROWS, DecodingConfig(max_new_tokens=6))
        for row, ids in enumerate(ROWS):
            own, read = prompt.select([row]), list(ids)
            for token in answers[row][0].token_ids:
                whole = states(lm, own, lm.embed_rows([read]), [len(read)]).values[-1:]
                assert int(lm.logits(whole).argmax()) == token
                read.append(token)


@torch.no_grad()
def test_one_call_for_all_layers_is_bit_equal_to_one_each(tiled: FrozenLM) -> None:
    lm = tiled
    assert lm.blocks is not None
    prompt, found = prompt_for(lm, len(ROWS)), []
    for _ in range(2):
        reading = begun(lm, prompt, lm.embed_rows(ROWS), [len(row) for row in ROWS], 4)
        states = [reading.states]
        reading.append(lm.embed_rows([[3, 4, 5, 6]]))
        reading.keep(torch.tensor([0, 3]))
        reading.append(lm.embed_rows([[7, 8]]))
        found.append([*states, reading.states])
        lm.blocks.__dict__["_whole"] = None  # then layer by layer
    for whole, single in zip(*found, strict=True):
        assert torch.equal(whole, single)


def drawn_factors(lm: FrozenLM, rank: int, random: torch.Generator) -> Factors:
    down = [torch.randn(lm.layers, s.reads, rank, generator=random) for s in lm.sites]
    up = [torch.randn(lm.layers, rank, sum(s.writes), generator=random) for s in lm.sites]
    both = zip(down, up, lm.sites, strict=True)
    scaled = [(a / s.reads**0.5, 0.1 * b / rank**0.5) for a, b, s in both]
    return Factors(lm.sites, tuple(a for a, _ in scaled), tuple(b for _, b in scaled))


@torch.no_grad()
@pytest.mark.parametrize("rank", [3, 32])
@pytest.mark.parametrize("kinds", ["between", "inside", "both"])
def test_updates_in_one_call_equal_one_each(tiled: FrozenLM, rank: int, kinds: str) -> None:
    """Rows of two skills with updates and one without; what a row reads is its own affair."""
    lm = tiled
    assert lm.blocks is not None
    random, d = torch.Generator().manual_seed(1), lm.hidden_size
    plain = prompt_for(lm, len(ROWS))
    prompts = [plain.select([row]) for row in range(len(ROWS))]
    several: list[Matrices | Factors] = []
    for row, number in ((0, 0), (1, 1), (3, 0)):
        if row != 3 and kinds in ("inside", ("between", "both")[number]):
            several.append(drawn_factors(lm, rank + number, random))
        elif row != 3:
            down = torch.randn(lm.layers, d, rank + number, generator=random) / d**0.5
            up = torch.randn(lm.layers, rank + number, d, generator=random)
            unit = lm.embedding_scale * (1 + torch.rand(lm.layers, generator=random))
            several.append(Matrices(down, up, unit))
        prompts[row] = prompts[row].updated(several[number])

    def read(prompt: Prompt, rows: list[list[int]]) -> list[torch.Tensor]:
        reading = begun(lm, prompt, lm.embed_rows(rows), [len(row) for row in rows], 4)
        found = [reading.states]
        reading.append(lm.embed_rows([[3]] * len(rows)))
        return [*found, reading.states]

    together = read(Prompt.stack(prompts), ROWS)
    without = read(plain, ROWS)
    alone = [read(prompt, [row]) for prompt, row in zip(prompts, ROWS, strict=True)]
    for one in range(2):
        assert torch.equal(together[one], torch.cat([own[one] for own in alone]))
    lm.blocks.__dict__["_whole"] = None  # then layer by layer
    for whole, single, other in zip(
        together, read(Prompt.stack(prompts), ROWS), without, strict=True
    ):
        assert float((whole - other).abs().max()) > 0.1 * float(single.abs().max())
        assert float((whole - single).abs().max()) < 0.02 * float(single.abs().max())

"""Low-rank factors of the layers' products: against the formula, and in every precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from shoulders.errors import LMError
from shoulders.lm import fused
from shoulders.lm.factors import Factors
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.inside import DOWN, GATE_UP, Inside
from shoulders.lm.int8 import to_int8
from shoulders.lm.kernels import available
from shoulders.lm.layer import Layer, Matrix
from shoulders.lm.prompt import Prompt
from shoulders.lm.reading import begun
from shoulders.lm.sites import sites_of
from shoulders.lm.smooth import smooth
from shoulders.lm.updates import Matrices
from shoulders.training.objective import Example, answer_losses

ROWS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 6]]
EXAMPLES = [Example(str(row), row, [20 + i, 21, 0], "t") for i, row in enumerate(ROWS)]


def drawn(lm: FrozenLM, rank: int = 3, seed: int = 0) -> Factors:
    """Return random factors that change states by a tenth or so, leaves that take gradients."""
    random = torch.Generator().manual_seed(seed)
    down, up = [], []
    for site in lm.sites:
        shape = lm.layers, site.reads, rank
        down.append((torch.randn(shape, generator=random) / site.reads**0.5).requires_grad_())
        shape = lm.layers, rank, sum(site.writes)
        up.append((0.1 * torch.randn(shape, generator=random)).requires_grad_())
    return Factors(lm.sites, tuple(down), tuple(up))


def with_factors(several: Sequence[Factors | None]) -> Prompt:
    """Return prompts of nothing but factors, one for each row."""
    empty = Prompt.empty(1)
    return Prompt.stack([empty if own is None else empty.updated(own) for own in several])


def figures(lm: FrozenLM, several: Sequence[Factors | None], **options: bool) -> list[Tensor]:
    """Return losses of the examples, and their gradients for all factors."""
    losses = answer_losses(lm, with_factors(several), EXAMPLES, **options)
    leaves = [t for own in dict.fromkeys(several) if own for t in (*own.down, *own.up)]
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


def assert_near(mine: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


# -- one product -------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 15, 40])
@pytest.mark.parametrize("divided", [False, True])
def test_a_product_and_its_gradients_are_the_formulas(t: int, divided: bool) -> None:
    random = torch.Generator().manual_seed(t)
    sizes = ((6, 10), (4, 6), (6, 14), (7, 6))

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def matrix(k: int, n: int) -> Matrix:
        reads, writes = (torch.rand(m, generator=random) + 0.5 for m in (k, n))
        return Matrix(some(n, k), None, None, *((reads, writes) if divided else ()))

    qkv, output, gate_up, down = (matrix(*size) for size in sizes)
    layer = Layer(torch.ones(6), qkv, output, torch.ones(6), gate_up, down)
    sets = [[part for k, n in sizes for part in (some(k, r), some(r, n))] for r in (2, 3)]
    first = torch.arange(t) % 3 == 0
    second = torch.arange(t) % 3 == 1
    places = [mask.nonzero()[:, 0] for mask in (first, second)]
    inside = Inside(layer, places, [part for own in sets for part in own], torch.float32)
    kept, xs, gs = [], [], []
    for site, (k, n) in enumerate(sizes):
        x, y, g = some(t, k), some(t, n), some(t, n)
        by, wide = (qkv, output, gate_up, down)[site], x.double()
        changed = y.clone()
        kept.append(inside.add(site, x, changed))
        expected = y.double()
        for own, mask in zip(sets, (first, second), strict=True):
            read = wide if by.reads is None else wide * by.reads
            added = read @ own[2 * site].double() @ own[2 * site + 1].double()
            added = added if by.writes is None else added / by.writes
            expected += added * mask[:, None]
        torch.testing.assert_close(changed.double(), expected, rtol=1e-5, atol=1e-5)
        xs.append(x), gs.append(g)
    sent = [inside.back(site, kept[site], g) for site, g in enumerate(gs)]
    found = inside.gradients()

    wide = [[part.double().requires_grad_() for part in own] for own in sets]
    inputs = [x.double().requires_grad_() for x in xs]
    total = torch.zeros((), dtype=torch.double)
    for site, (x, g) in enumerate(zip(inputs, gs, strict=True)):
        by = (qkv, output, gate_up, down)[site]
        for own, mask in zip(wide, (first, second), strict=True):
            read = x if by.reads is None else x * by.reads
            added = read @ own[2 * site] @ own[2 * site + 1]
            added = added if by.writes is None else added / by.writes
            total = total + (added * mask[:, None] * g).sum()
    right = torch.autograd.grad(total, [*inputs, *(part for own in wide for part in own)])
    for mine, theirs in zip([*sent, *found], right, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


# -- whole LMs ---------------------------------------------------------------------------


def test_fused_gradients_are_those_of_hooks(fresh_lm: Callable[..., FrozenLM]) -> None:
    """Rows of two skills and one without, through our layers and through Hugging Face's."""
    lm = fresh_lm("qwen2")
    first, second = drawn(lm), drawn(lm, 2, seed=1)
    several = [first, None, second, first]
    mine = figures(lm, several)
    lm.blocks = None
    assert_near(mine, figures(lm, several), 1e-4)
    assert all(bool(gradient.any()) for gradient in mine[1:])


def test_factors_mean_the_same_in_an_lm_that_was_smoothed(
    fresh_lm: Callable[..., FrozenLM],
) -> None:
    """What is trained in int8 is asked in float32: channels that were divided are put right."""
    lm = fresh_lm("llama")
    several = [drawn(lm)] * len(ROWS)
    before = figures(lm, several)
    smooth(lm.model, lm.tokenizer)
    smoothed = FrozenLM(lm.model, lm.tokenizer, lm.name)
    assert smoothed.blocks is not None
    layer = smoothed.blocks.layers[0]
    assert layer.down.reads is not None
    assert torch.equal(layer.down.reads, layer.gate_up.writes[-len(layer.down.reads) :])
    assert_near(figures(smoothed, several), before, 1e-4)
    smoothed.blocks = None
    assert_near(figures(smoothed, several), before, 1e-4)


def rounded(lm: FrozenLM) -> FrozenLM:
    smooth(lm.model, lm.tokenizer)
    to_int8(lm.model)
    return FrozenLM(lm.model, lm.tokenizer, lm.name, fingerprint="f" * 64)


@pytest.mark.parametrize("arch", ["llama", "llama64"])
def test_in_int8_compiled_layers_are_near_the_plain_ones(
    fresh_lm: Callable[..., FrozenLM], monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr("shoulders.lm.head.available", lambda: None)  # has a test of its own
    lm = rounded(fresh_lm(arch))
    assert lm.blocks is not None
    several = [drawn(lm), None, drawn(lm, 2, seed=1), None]
    narrow = figures(lm, several)
    lm.blocks.__dict__["_narrow"] = torch.float32
    mine = figures(lm, several)
    assert_near(narrow, mine, 0.2)
    again = figures(lm, several, recompute=True)
    assert all(torch.equal(one, other) for one, other in zip(mine, again, strict=True))
    monkeypatch.setattr(fused, "available", lambda: None)
    lm.blocks = fused.Blocks.of(lm.model)
    assert lm.blocks is not None
    lm.blocks.__dict__["_narrow"] = torch.float32
    # A level may fall to the other side where both sum in another order.
    assert_near(mine, figures(lm, several), 0.1)


@torch.no_grad()
def test_in_int8_one_call_for_all_layers_equals_one_each(
    fresh_lm: Callable[..., FrozenLM],
) -> None:
    compiled = available()
    if compiled is None or compiled.int8 is None:
        pytest.skip("on this processor layers are read one by one")
    lm = rounded(fresh_lm("llama64"))
    assert lm.blocks is not None
    assert lm.blocks._whole is not None
    own = drawn(lm)
    prompt, found = with_factors([own, None, own, drawn(lm, 2, seed=1)]), []
    for _ in range(2):
        reading = begun(lm, prompt, lm.embed_rows(ROWS), [len(row) for row in ROWS], 4)
        found.append(reading.states)
        lm.blocks.__dict__["_whole"] = None  # then layer by layer
    plain = begun(lm, Prompt.empty(4), lm.embed_rows(ROWS), [len(row) for row in ROWS], 4).states
    assert float((found[0] - found[1]).norm()) < 0.02 * float(found[1].norm())
    assert float((found[0] - plain).norm()) > 0.1 * float(plain.norm())


def test_a_row_in_int8_is_bit_equal_to_itself_alone(fresh_lm: Callable[..., FrozenLM]) -> None:
    lm = rounded(fresh_lm("llama"))
    first, second = drawn(lm), drawn(lm, 2, seed=1)
    several = [first, second, None, first]

    def read(rows: Sequence[int]) -> Tensor:
        tokens = [ROWS[row] for row in rows]
        prompt = with_factors([several[row] for row in rows])
        return begun(lm, prompt, lm.embed_rows(tokens), [len(t) for t in tokens], 4).states

    with torch.no_grad():
        alone = torch.cat([read([row]) for row in range(len(ROWS))])
        assert torch.equal(read(range(len(ROWS))), alone)


# -- places ------------------------------------------------------------------------------


def test_what_reads_the_same_is_one_site(tiny_lm: Callable[[str], FrozenLM]) -> None:
    names = [[n.rpartition(".")[2] for n in site.names] for site in tiny_lm("llama").sites]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"],
                     ["down_proj"]]  # fmt: skip
    lm = tiny_lm("gpt2")
    assert [site.names for site in lm.sites] == [
        ("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)
    ]  # fmt: skip
    assert (lm.sites[0].reads, lm.sites[0].writes) == (lm.hidden_size, (3 * lm.hidden_size,))


def test_experts_and_layers_that_differ_have_no_place() -> None:
    def layer(width: int) -> nn.Module:
        experts = nn.ModuleDict({"one": nn.Linear(4, 4)})
        return nn.ModuleDict({"o_proj": nn.Linear(4, width), "experts": experts})

    assert [site.names for site in sites_of([layer(5), layer(5)], "LM")] == [("o_proj",)]
    with pytest.raises(LMError, match="LM: its layers differ"):
        sites_of([layer(5), layer(6)], "LM")
    with pytest.raises(LMError, match="no linear layers"):
        sites_of([nn.ModuleDict({"norm": nn.LayerNorm(4)})], "LM")


def test_updates_between_layers_need_no_layers_that_are_alike(
    fresh_lm: Callable[..., FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = fresh_lm("gpt2")
    d = lm.hidden_size
    updates = Matrices(
        torch.ones(lm.layers, d, 1), torch.ones(lm.layers, 1, d), torch.ones(lm.layers)
    )
    monkeypatch.setattr("shoulders.lm.frozen.sites_of", None)  # would fail
    prompt = Prompt.empty(len(ROWS)).updated(updates)
    with torch.no_grad():
        changed, plain = (answer_losses(lm, p, EXAMPLES) for p in (prompt, Prompt.empty(len(ROWS))))
    assert not torch.equal(changed, plain)


def test_sites_are_those_of_the_fused_layers(tiny_lm: Callable[[str], FrozenLM]) -> None:
    lm = tiny_lm("llama")
    assert lm.blocks is not None
    layer = lm.blocks.layers[0]
    matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
    shapes = [(site.reads, sum(site.writes)) for site in lm.sites]
    assert shapes == [(m.values.shape[1], m.values.shape[0]) for m in matrices]
    assert shapes[GATE_UP][1] == 2 * shapes[DOWN][0]

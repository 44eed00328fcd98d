"""What a process does beside the LM: default types, autocast, threads, and rows gone wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from shoulders.errors import LMError
from shoulders.lm import fused
from shoulders.lm.decode import DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.kernels import available
from shoulders.lm.laid import Laid
from shoulders.lm.load import load_lm
from shoulders.lm.pack import can_pack
from shoulders.lm.prompt import Prompt
from shoulders.lm.reading import begun, read_once
from shoulders.lm.states import states
from shoulders.serving.pool import Pool
from shoulders.training.objective import Example, answer_losses
from tiny_models import save_tiny_lm

ROWS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
EXAMPLES = [Example("", row, [20 + i, 30, 0], "task") for i, row in enumerate(ROWS)]
GREEDY = DecodingConfig(max_new_tokens=6)
NAN = float("nan")


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    folder = save_tiny_lm(tmp_path_factory.mktemp("lm") / "lm")
    found: FrozenLM = load_lm(str(folder), dtype=request.param)
    return found


def prefix_for(lm: FrozenLM, rows: int) -> Tensor:
    shape = lm.prefix_shape
    size = rows, shape.layers, 2, shape.kv_heads, 3, shape.head_dim
    random = torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(size, generator=random, dtype=torch.float32)


def figures(lm: FrozenLM) -> list[Tensor]:
    """Return losses, their gradient, and tokens, greedy and drawn."""
    prefix = prefix_for(lm, len(ROWS)).requires_grad_(True)
    losses = answer_losses(lm, Prompt.of_keys_values(prefix), EXAMPLES)
    (gradient,) = torch.autograd.grad(losses.sum(), [prefix])
    prompt = Prompt.of_keys_values(prefix.detach())
    drawn = DecodingConfig(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=3)
    ids = [torch.tensor(c[0].token_ids) for way in (GREEDY, drawn)
           for c in generate(lm, prompt, ROWS, way)]  # fmt: skip
    return [losses.detach(), gradient, *ids]


@pytest.fixture
def default_type() -> Iterator[Callable[[torch.dtype], None]]:
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
def test_torchs_default_type_is_another_threads_affair(
    lm: FrozenLM, other: torch.dtype, default_type: Callable[[torch.dtype], None]
) -> None:
    """Transformers sets it while it builds a model: C would write floats where halves fit."""
    expected = figures(lm)
    default_type(other)
    found = figures(lm)
    default_type(torch.float32)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_layers_compute_in_their_own_types_under_autocast(lm: FrozenLM) -> None:
    embedded, counts = lm.embed_rows(ROWS), [len(row) for row in ROWS]
    prompt = Prompt.of_keys_values(prefix_for(lm, len(ROWS)))

    def found() -> list[Tensor]:
        with torch.no_grad():
            return [
                states(lm, prompt, embedded, counts).values,
                begun(lm, prompt, embedded, counts, 4).states,
            ]

    expected = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mine, theirs in zip(found(), expected, strict=True):
            assert torch.equal(mine, theirs)
        leaf = prefix_for(lm, len(ROWS)).requires_grad_(True)
        answer_losses(lm, Prompt.of_keys_values(leaf), EXAMPLES).sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


def test_a_weight_that_two_threads_pack_keeps_its_address() -> None:
    """Without a lock (Python 3.12 has none there) both may pack it; the first one is handed on."""
    both = threading.Barrier(2, timeout=30)

    def slowly(weight: Tensor) -> Tensor:
        both.wait()
        return weight.clone()

    laid, weight = Laid(slowly), torch.arange(6.0).view(2, 3)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(laid.forward(weight))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found[0] is found[1] is laid.forward(weight)


def test_a_target_that_the_lm_does_not_have_is_refused(fresh_lm: Callable[..., FrozenLM]) -> None:
    """The compiled head would read and write beyond its logits."""
    for dtype in ("float32", "bfloat16"):
        lm = fresh_lm("llama64", dtype=dtype)
        hidden, many = torch.zeros(2, lm.hidden_size), len(lm.model.get_input_embeddings().weight)
        for wrong in (many, 5_000_000, -7):
            with pytest.raises(IndexError):
                lm.losses(hidden, torch.tensor([3, wrong]))


def test_a_tokenizer_that_ends_with_what_the_lm_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_lm(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    many = load_lm(str(folder), dtype="float32").model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<more {i}>" for i in range(many - len(tokenizer))])
    tokenizer.add_special_tokens({"eos_token": "<the end>"})
    assert tokenizer.eos_token_id == many
    tokenizer.save_pretrained(folder)
    with pytest.raises(LMError, match=f"has {many + 1} tokens, the LM embeddings for {many}:"):
        load_lm(str(folder), dtype="float32")


# -- one row is no other row's affair ---------------------------------------------------


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


@pytest.mark.parametrize("kernels", ["compiled", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_is_no_number_stays_alone(
    kernels: str, dtype: str, fresh_lm: Callable[..., FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prefill, in steps, in training, and where its slot is taken by another row."""
    if kernels == "compiled" and available() is None:
        pytest.skip("no compiler")
    if kernels == "plain":
        monkeypatch.setattr(fused, "available", lambda: None)
    lm = fresh_lm("llama", dtype=dtype)
    assert lm.blocks is not None
    d, shape = lm.hidden_size, lm.prefix_shape
    prefix = torch.full((1, shape.layers, 2, shape.kv_heads, 2, shape.head_dim), NAN)
    vectors = torch.full((1, 1, d), NAN)
    ids = [[5, 6, 7, 8], [9, 10]]
    for bad in (Prompt.of_keys_values(prefix), Prompt.of_vectors(vectors)):
        both = Prompt.stack([bad, Prompt.empty(1)])
        reading = begun(lm, both, lm.embed_rows(ids), [4, 2], 8)
        assert finite(reading.states[4:])
        reading.append(lm.embed(torch.tensor([3, 4])))
        assert finite(reading.states[1])
        assert not finite(reading.states[0])
    two = Prompt.of_vectors(torch.cat([vectors, torch.zeros(1, 1, d)]))
    trained = states(lm, two, lm.embed_rows(ids), [4, 2])
    assert finite(trained.values[trained.starts[1] :][:2])
    pool = Pool(lm.blocks)
    first, second = pool.enter(Prompt.of_keys_values(prefix), 64), pool.enter(Prompt.empty(1), 64)
    pool.read(lm.embed_rows([[1] * 20, [2]]), [20, 1], [first, second])
    pool.leave(first)
    third = pool.enter(Prompt.empty(1), 64)
    assert third == first
    pool.read(lm.embed_rows([[3] * 25]), [25], [second])
    found = pool.read(lm.embed_rows([[2], [2, 4]]), [1, 2], [second, third])
    assert finite(found)


def test_within_a_sliding_window_neighbours_and_room_choose_no_layers(
    fresh_lm: Callable[..., FrozenLM],
) -> None:
    """In bfloat16, where our layers and the LM's own round otherwise."""
    lm = fresh_lm("mistral", dtype="bfloat16")
    window = lm.max_positions
    assert window == lm.sliding_window
    short, long = [3 + i % 300 for i in range(window // 3)], [7] * (window - 2)
    rows, counts = [short, long], [len(short), len(long)]
    embedded = lm.embed_rows(rows)
    alone = begun(lm, Prompt.empty(1), lm.embed_rows([short]), counts[:1], 2)
    beside = begun(lm, Prompt.empty(2), embedded, counts, 2 * window)
    assert torch.equal(alone.states, beside.states[: counts[0]])
    tapped = begun(lm, Prompt.empty(2), embedded, counts, window, taps=(lm.layers,))
    assert tapped.states.shape == (1, sum(counts), lm.hidden_size)
    few, many = (
        generate(lm, Prompt.empty(1), [short], DecodingConfig(max_new_tokens=n))[0][0].token_ids
        for n in (3, 3 * window)
    )
    assert many[: len(few)] == few
    # Each of these rows is within the window, with its own prompt.
    vectors = Prompt.of_vectors(torch.zeros(1, window // 3, lm.hidden_size))
    assert can_pack(lm, Prompt.stack([vectors, Prompt.empty(1)]), counts)


def test_a_prompt_beyond_a_sliding_window_is_not_read_ahead(
    tiny_lm: Callable[[str], FrozenLM],
) -> None:
    lm = tiny_lm("mistral")
    assert lm.sliding_window is not None
    for more in (0, 1):
        vectors = torch.zeros(1, lm.sliding_window + more, lm.hidden_size)
        prompt = Prompt.of_vectors(vectors)
        assert (read_once(lm, prompt) is prompt) == bool(more)


def test_a_rows_states_do_not_depend_on_the_length_of_another_ones_prompt(lm: FrozenLM) -> None:
    """Rows that are scored, prompts of vectors and prefixes."""
    vectors = [torch.full((1, n, lm.hidden_size), lm.embedding_scale) for n in (2, 4)]
    prefix = prefix_for(lm, 1)
    counts = [len(row) for row in ROWS]

    def rows_of(*prompts: Prompt) -> Tensor:
        b = len(prompts)
        with torch.no_grad():
            read = states(lm, Prompt.stack([*prompts]), lm.embed_rows(ROWS[:b]), counts[:b])
        return read.values[read.starts[0] :][: counts[0]]

    for own in (Prompt.of_vectors(vectors[0]), Prompt.of_keys_values(prefix)):
        alone = rows_of(own)
        assert torch.equal(rows_of(own, own), alone)
        for other in (Prompt.of_vectors(vectors[1]), Prompt.empty(1)):
            assert torch.equal(rows_of(own, other), alone)

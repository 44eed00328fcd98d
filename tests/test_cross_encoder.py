"""The cross-encoder: learns a toy task, is deterministic, comes back from disk bit by bit."""

from __future__ import annotations

import ast
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from shoulders.errors import ArtefactError, LMError, ShouldersError, TrainingError
from shoulders.reader import rerankers
from shoulders.reader.crossfit import cross_fitted
from shoulders.reader.mining import Mined
from shoulders.reader.passage import Passage
from shoulders.reader.rerankers.cross_encoder import (
    FILE,
    CrossEncoderConfig,
    CrossEncoderReranker,
    load_cross_encoder,
    save_cross_encoder,
)
from shoulders.reader.rerankers.losses import ListLoss, loss_of_list
from shoulders.reader.rerankers.training import Trained, train_cross_encoder
from tiny_models import save_tiny_encoder

RIGHT, WRONG = ("paris", "madrid"), ("two", "three", "short")


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder as it is, with dropout."""
    return save_tiny_encoder(tmp_path_factory.mktemp("dropping"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder without dropout: it learns sooner."""
    folder = save_tiny_encoder(tmp_path_factory.mktemp("encoder"))
    values = json.loads((folder / "config.json").read_text())
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def toy(count: int, seed: int = 0) -> list[Mined]:
    """Questions whose positive holds one of two words and whose negatives hold others."""
    draw = random.Random(seed)

    def passage(words: tuple[str, ...], name: str) -> Passage:
        filler = " capital is" * draw.randint(0, 2)
        return Passage(name, "", f"{draw.choice(words)} {draw.choice(words)}{filler}")

    return [
        Mined(
            f"write question {i}",
            (passage(RIGHT, f"{i}+"),),
            tuple(passage(WRONG, f"{i}-{j}") for j in range(draw.randint(1, 3))),
        )
        for i in range(count)
    ]


def config(encoder: Path, **changed) -> CrossEncoderConfig:
    quick = {"lr": 5e-3, "epochs": 6, "rows_per_step": 8, "max_length": 48}
    return CrossEncoderConfig(encoder=str(encoder), **quick | changed)


def scored(reranker: CrossEncoderReranker, examples: list[Mined]) -> list[list[float]]:
    passages = [[*e.positives, *e.negatives] for e in examples]
    return reranker.score(
        [e.question for e in examples], passages, [[0.0] * len(p) for p in passages]
    )


@pytest.fixture(scope="module")
def trained(encoder: Path) -> Trained:
    return train_cross_encoder(toy(32), config(encoder), device="cpu")


@pytest.mark.parametrize("loss", ["listwise", "binary"])
def test_learns_a_toy_task_until_it_separates(encoder: Path, loss: str, trained: Trained) -> None:
    if loss != "listwise":
        trained = train_cross_encoder(toy(32), config(encoder, loss=loss), device="cpu")
    fresh = toy(20, seed=1)
    assert all(row[0] > max(row[1:]) for row in scored(trained.reranker, fresh))
    before = CrossEncoderReranker.start(config(encoder), device="cpu")
    assert not all(row[0] > max(row[1:]) for row in scored(before, fresh))
    assert len(trained.losses) == 6 * 32 / 4
    assert sum(trained.losses[-8:]) < 0.2 * sum(trained.losses[:8])


def test_the_same_seed_is_the_same_model_and_leaves_no_trace(dropping: Path) -> None:
    quick = config(dropping, epochs=1)
    torch.rand(3)
    random.random()
    state = torch.random.get_rng_state(), random.getstate()
    one = train_cross_encoder(toy(8), quick, device="cpu")
    assert torch.equal(state[0], torch.random.get_rng_state())
    assert state[1] == random.getstate()
    torch.rand(3)
    other = train_cross_encoder(toy(8), quick, device="cpu")
    third = train_cross_encoder(toy(8), config(dropping, epochs=1, seed=1), device="cpu")
    assert one.losses == other.losses
    assert scored(one.reranker, toy(4)) == scored(other.reranker, toy(4))
    assert scored(one.reranker, toy(4)) != scored(third.reranker, toy(4))


def test_dropout_can_be_turned_off(dropping: Path, encoder: Path) -> None:
    off = train_cross_encoder(toy(8), config(dropping, epochs=1, dropout=0.0), device="cpu")
    never = train_cross_encoder(toy(8), config(encoder, epochs=1), device="cpu")
    on = train_cross_encoder(toy(8), config(dropping, epochs=1), device="cpu")
    assert off.losses == never.losses != on.losses


def test_a_step_is_the_same_however_it_is_split(encoder: Path) -> None:
    # Steps of eight questions and of four: were gradients added up and not averaged, Adam would
    # take the second step for half as important when it is taken question by question.
    models = []
    for rows_per_pass in (1, 8):
        quick = config(encoder, epochs=1, rows_per_pass=rows_per_pass, warmup=0.0, clip=1e9)
        models.append(train_cross_encoder(toy(12), quick, device="cpu").reranker.model)
    for (name, one), (_, other) in zip(*(m.named_parameters() for m in models), strict=True):
        # Listwise losses do not depend on the last bias, nor softmax on that of keys: what is
        # their gradient is rounding noise, which Adam scales to any other's size.
        if not name.endswith(("classifier.bias", "key.bias")):
            assert (one - other).abs().mean() < 1e-4, name


def test_progress_and_silence(encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[int] = []
    quick = config(encoder, epochs=2)
    reranker = train_cross_encoder(toy(9), quick, device="cpu", on_questions=told.append).reranker
    assert sum(told) == 18
    pairs: list[int] = []
    examples = toy(40)
    passages = [[*e.positives, *e.negatives] for e in examples]
    reranker.score([e.question for e in examples], passages, passages_scores(passages),
                   on_pairs=pairs.append)  # fmt: skip
    assert sum(pairs) == sum(map(len, passages))
    assert len(pairs) > 1
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def passages_scores(passages: list[list[Passage]]) -> list[list[float]]:
    return [[0.0] * len(row) for row in passages]


def test_comes_back_from_disk_bit_by_bit(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "reranker"
    manifest = save_cross_encoder(trained.reranker, folder, {"questions": 32})
    loaded = load_cross_encoder(folder, device="cpu")
    assert scored(loaded, toy(20, 2)) == scored(trained.reranker, toy(20, 2))
    assert loaded.config == trained.reranker.config
    assert manifest.parameters == loaded.parameters
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}  # promise 7: no pickle
    with pytest.raises(ArtefactError, match="already holds"):
        save_cross_encoder(trained.reranker, folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: missing"),
        (lambda f: flip(f / "model.safetensors"), r"model\.safetensors: damaged"),
        (lambda f: (f / "config.json").write_text("{}"), r"config\.json: damaged"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), r"pytorch_model\.bin: not listed"),
        (lambda f: (f / FILE).unlink(), "holds no"),
        (lambda f: (f / FILE).write_text("{"), "not valid JSON"),
        (lambda f: (f / FILE).write_text('{"format_version": 9}'), "format version 9"),
        (lambda f: (f / FILE).write_text('{"format_version": 1}'), "damaged: key"),
    ],
)
def test_a_spoilt_folder_is_refused_by_name(
    trained: Trained, tmp_path: Path, spoil, message: str
) -> None:
    save_cross_encoder(trained.reranker, tmp_path / "r")
    spoil(tmp_path / "r")
    with pytest.raises(ArtefactError, match=message):
        load_cross_encoder(tmp_path / "r")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_no_candidates_and_too_long_ones(trained: Trained) -> None:
    long = Passage("long", "title", "paris " + "the capital " * 100_000)
    longer = Passage("longer", "title", long.text + "madrid two three")
    same, _, ends = trained.reranker.score(
        ["q", "nobody", "r"], [[long, longer], [], [long]], [[1, 2], [], [3]]
    )
    assert same[0] == pytest.approx(same[1], rel=1e-6)  # what is beyond the limit is not read
    assert all(map(math.isfinite, [*same, *ends]))
    assert trained.reranker.score([], [], []) == []
    question = "the capital of france " * 500
    assert math.isfinite(trained.reranker.score([question], [[long]], [[0.0]])[0][0])


def test_the_length_limit_is_the_configured_one(encoder: Path) -> None:
    short = CrossEncoderReranker.start(config(encoder, max_length=8), device="cpu")
    tail = [Passage(end, "", f"the capital of france and the capital {end}") for end in "ab"]
    question = ["answer the question with a short answer"]
    (row,) = short.score(question, [tail], [[0, 0]])
    # On some processors equal rows of one product differ in their last bits.
    assert row[0] == pytest.approx(row[1], rel=1e-6)
    beyond = CrossEncoderReranker.start(config(encoder, max_length=500), device="cpu")
    assert beyond.model.max_seq_length == 64  # the encoder's positions
    (row,) = beyond.score(question, [tail], [[0, 0]])
    assert row[0] != pytest.approx(row[1], rel=1e-4)  # the end is read


def test_scores_do_not_depend_on_the_company(trained: Trained) -> None:
    examples = toy(40, 3)
    together = scored(trained.reranker, examples)
    alone = [scored(trained.reranker, [example])[0] for example in examples]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_diverging_run_says_so(encoder: Path) -> None:
    wild = config(encoder, lr=1e36, clip=1e9, warmup=0.0)
    with pytest.raises(TrainingError, match=r"loss is (nan|inf)"):
        train_cross_encoder(toy(32), wild, device="cpu")


def test_weights_that_the_last_step_spoilt_are_found(encoder: Path) -> None:
    wild = config(encoder, lr=1e39, clip=1e9, warmup=0.0, epochs=1)
    with pytest.raises(TrainingError, match="weights are not finite"):
        train_cross_encoder(toy(8), wild, device="cpu")


def test_nothing_to_train_on(encoder: Path) -> None:
    with pytest.raises(TrainingError, match="no question"):
        train_cross_encoder([], config(encoder))


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LMError, match="cannot be loaded"):
        CrossEncoderReranker.start(config(tmp_path))


@pytest.mark.parametrize("name", ["sentence_transformers.cross_encoder", "datasets"])
def test_a_missing_library_is_named_with_the_command(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ShouldersError, match=r"pip install -e '\.\[reader\]'"):
        train_cross_encoder(toy(2), config(encoder), device="cpu")


def test_importing_the_rerankers_imports_nothing_heavy() -> None:
    heavy = {"sentence_transformers", "datasets", "sklearn", "accelerate", "matplotlib", "scipy"}
    for file in Path(rerankers.__file__).parents[1].rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {name.split(".")[0] for name in names}, file


def test_losses_by_hand() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    negatives = math.e + math.exp(-1)
    listwise = [math.log(math.exp(p) + negatives) - p for p in (2.0, 0.0)]
    assert float(loss_of_list(logits, labels, "listwise")) == pytest.approx(sum(listwise) / 2)

    def plus(x: float) -> float:
        return math.log(1 + math.exp(x))

    binary = (plus(-2) + plus(0)) / 4 + (plus(1) + plus(-1)) / 4
    assert float(loss_of_list(logits, labels, "binary")) == pytest.approx(binary)


def test_the_loss_sees_each_passage_with_its_own_label(encoder: Path) -> None:
    reranker = CrossEncoderReranker.start(config(encoder), device="cpu")
    examples = toy(12)
    passages = [[*e.positives, *e.negatives] for e in examples]
    texts = [[f"{p.title}\n{p.text}" if p.title else p.text for p in row] for row in passages]
    labels = [torch.tensor([1.0] + [0.0] * (len(row) - 1)) for row in passages]
    loss = ListLoss(reranker.model, "listwise")([[e.question for e in examples], texts], labels)
    rows = [torch.tensor(row) for row in scored(reranker, examples)]
    expected = [
        loss_of_list(row, label, "listwise") for row, label in zip(rows, labels, strict=True)
    ]
    assert float(loss.detach()) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)


def test_cross_fitting_a_real_one(encoder: Path, tmp_path: Path) -> None:
    """On random labels only a model that saw a question can be right about it."""
    draw = random.Random(5)
    words = [f"{a}{b}" for a in "abcdefghij" for b in "vwxyz"]
    passages = [
        [Passage(f"{i}{j}", "", " ".join(draw.sample(words, 2))) for j in range(2)]
        for i in range(20)
    ]
    questions = [f"question {i}" for i in range(20)]
    first = [draw.random() < 0.5 for _ in questions]
    examples = [
        Mined(q, (row[not one],), (row[one],))
        for q, row, one in zip(questions, passages, first, strict=True)
    ]
    long = config(encoder, epochs=20, rows_per_pass=8)

    def train(kept: list[int]) -> CrossEncoderReranker:
        return train_cross_encoder([examples[i] for i in kept], long, device="cpu").reranker

    def right(scores: list[list[float]]) -> float:
        hits = [(row[0] > row[1]) == one for row, one in zip(scores, first, strict=True)]
        return sum(hits) / len(hits)

    retrieved = [[0.0, 0.0] for _ in questions]
    seen = train(list(range(20))).score(questions, passages, retrieved)
    fair = cross_fitted(
        train, questions, passages, retrieved,
        folds=2, seed=0, cache=tmp_path, settings=long.model_dump(),
    )  # fmt: skip
    assert right(seen) >= 0.95
    assert right(fair) <= 0.75

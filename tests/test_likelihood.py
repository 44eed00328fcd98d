"""UPR equals a plain loop over full logits, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from shoulders.errors import WindowError
from shoulders.lm.frozen import FrozenLM
from shoulders.reader.passage import Passage
from shoulders.reader.rerankers import likelihood
from shoulders.reader.rerankers.likelihood import LikelihoodConfig, LikelihoodReranker

SHORT = LikelihoodConfig(instruction="P: {passage}\nQ:", max_passage_tokens=30)
QUESTIONS = ["who wrote it?", "  two  ", "nothing was found", "a long one about France"]
PASSAGES = [
    [Passage("a", "Oslo", "The capital of Norway"), Passage("b", "", "x")],
    [Passage("c", "", "one two three four five"), Passage("a", "Oslo", "The capital of Norway")],
    [],
    [Passage("d", "", "nobody knows " * 500)],  # cut
]


def plainly(lm: FrozenLM, config: LikelihoodConfig, question: str, passage: Passage) -> float:
    """Return the mean log-likelihood, token by token, each from a forward pass over ids."""
    before, after = config.instruction.split("{passage}")
    text = f"{passage.title}\n{passage.text}" if passage.title else passage.text
    encode = lm.tokenizer.encode
    row = encode(before, add_special_tokens=False)
    row += lm.tokenize([text])[0][: config.max_passage_tokens]  # nothing in it is special
    row += encode(after, add_special_tokens=False)
    total, asked = 0.0, encode(" " + question.strip(), add_special_tokens=False)
    for token in asked:
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
        total += float(torch.log_softmax(logits.float(), -1)[token])
        row.append(token)
    return total / len(asked)


def zeros(passages: list[list[Passage]]) -> list[list[float]]:
    return [[0.0] * len(row) for row in passages]


@pytest.mark.parametrize("batch_rows", [1, 32])
def test_equals_a_plain_loop(tiny_lm, monkeypatch: pytest.MonkeyPatch, batch_rows: int) -> None:
    monkeypatch.setattr(likelihood, "BATCH_ROWS", batch_rows)
    lm = tiny_lm("llama")
    told: list[int] = []
    reranker = LikelihoodReranker(lm, SHORT)
    scores = reranker.score(QUESTIONS, PASSAGES, zeros(PASSAGES), on_pairs=told.append)
    expected = [
        [plainly(lm, SHORT, question, passage) for passage in own]
        for question, own in zip(QUESTIONS, PASSAGES, strict=True)
    ]
    for row, right in zip(scores, expected, strict=True):
        assert row == pytest.approx(right, abs=1e-4)
    assert sum(told) == 5
    assert len({value for row in scores for value in row}) == 5  # the passage matters


@pytest.mark.slow
def test_equals_a_plain_loop_on_the_embedded_lm(embedded_lm: FrozenLM) -> None:
    passages = [
        Passage("1", "Paris", "Paris is the capital of France, on the Seine."),
        Passage("2", "Bread", "Bread is made of flour, water and salt."),
        Passage("3", "Lyon", "Lyon is a city in France."),
    ]
    question = "what is the capital of france"
    reranker = LikelihoodReranker(embedded_lm)
    (scores,) = reranker.score([question], [passages], [[0.0] * 3])
    expected = [plainly(embedded_lm, reranker.config, question, p) for p in passages]
    assert scores == pytest.approx(expected, abs=1e-3)
    assert min(scores) == scores[1]  # bread


def test_nothing_to_score(tiny_lm) -> None:
    reranker = LikelihoodReranker(tiny_lm("llama"), SHORT)
    assert reranker.score([], [], []) == []
    assert reranker.score(["a"], [[]], [[]]) == [[]]


def test_passages_are_cut_to_the_window_and_questions_are_not(tiny_lm) -> None:
    lm = tiny_lm("llama")
    whole = LikelihoodConfig(instruction=SHORT.instruction, max_passage_tokens=1000)
    long = PASSAGES[3][0]
    ((value,),) = LikelihoodReranker(lm, whole).score(["who?"], [[long]], [[0.0]])
    frame = sum(map(len, lm.tokenize(["P: ", "\nQ:", " who?"])))
    room = LikelihoodConfig(
        instruction=SHORT.instruction, max_passage_tokens=lm.max_positions - frame
    )
    assert value == pytest.approx(plainly(lm, room, "who?", long), abs=1e-4)
    with pytest.raises(WindowError, match="cannot be scored"):
        LikelihoodReranker(lm, SHORT).score(["word " * 80], [[long]], [[0.0]])


def test_passages_cannot_speak_to_the_lm_in_special_tokens(tiny_lm) -> None:
    lm = tiny_lm("llama")
    end = Passage("e", "", "x<eos>y")
    ((value,),) = LikelihoodReranker(lm, SHORT).score(["who?"], [[end]], [[0.0]])
    ((spelt,),) = LikelihoodReranker(lm, SHORT).score(
        ["who?"], [[Passage("f", "", "x y")]], [[0.0]]
    )
    assert lm.tokenizer.eos_token_id not in lm.tokenize([end.text])[0]
    assert value != spelt
    assert value == pytest.approx(plainly(lm, SHORT, "who?", end), abs=1e-4)


@pytest.mark.parametrize("instruction", ["no place", "{passage}{passage}:", "ends with {passage}"])
def test_an_instruction_without_a_place_is_refused(instruction: str) -> None:
    with pytest.raises(ValidationError, match="passage"):
        LikelihoodConfig(instruction=instruction)

"""Reading: passages found, ordered, packed, read; and what the report card says of each stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shoulders.errors import DataError, WindowError
from shoulders.evaluation.report_card import dump_answers, plot_report_card, report_card
from shoulders.lm.decode import Completion
from shoulders.lm.frozen import FrozenLM
from shoulders.reader.contexts import Contexts, Ranked
from shoulders.reader.packer import PackConfig
from shoulders.reader.passage import Found, Passage
from shoulders.reader.questions import Question
from shoulders.skills.reader import NO_ANSWER, Confidence, Reader, ReadingConfig
from shoulders.skills.skill import Skill
from shoulders.training.read import write_contexts

PASSAGES = {
    "a": Passage("a", "", "Rome is old."),
    "b": Passage("b", "France", "Its capital is Paris."),
    "c": Passage("c", "", "Madrid lies in Spain."),
}


class Listed:
    """A retriever and collection of `PASSAGES`, always in this order."""

    def __init__(self, order: str = "abc") -> None:
        self.order = list(order)

    def search(self, questions: Sequence[str], k: int) -> Found:
        ids = self.order[:k]
        return Found(
            [ids] * len(questions), [[float(-i) for i in range(len(ids))]] * len(questions)
        )

    def passages(self, ids: Sequence[str]) -> list[Passage]:
        return [PASSAGES[i] for i in ids]


class Likes:
    """A re-ranker that puts what holds a word first."""

    def __init__(self, word: str) -> None:
        self.word = word

    def score(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        retrieved: Sequence[Sequence[float]],
        *,
        on_pairs: Any = None,
    ) -> list[list[float]]:
        return [[float(self.word in p.text) for p in own] for own in passages]


class Says:
    """Stands for a skill: gives each input the completion of the first word that it holds."""

    def __init__(self, answers: dict[str, tuple[str, float]]) -> None:
        self.answers = answers
        self.texts: list[str] = []

    def input_room(self, answer_room: int = 1) -> int:
        return 1000

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def generate(self, texts: Sequence[str], decoding: Any, *, on_rows: Any = None) -> Any:
        self.texts = list(texts)
        if on_rows is not None:
            on_rows(len(texts))
        found = [next(v for k, v in self.answers.items() if k in text) for text in texts]
        return [[Completion(text, [1, 2], logprob, "stop")] for text, logprob in found]


def reader_of(says: Any, reranker: Any = None, **config: Any) -> Reader:
    listed = Listed()
    contexts = Contexts(listed, listed, reranker, k=3)
    return Reader(says, contexts, ReadingConfig.model_validate(config))


def test_contexts_keep_both_orders() -> None:
    listed = Listed("cab")
    (ranked,) = Contexts(listed, listed, Likes("Paris"), 3).ranked([Question("q?", ())])
    assert [p.id for p in ranked.retrieved] == ["c", "a", "b"]
    assert ranked.retrieved_scores == (0.0, -1.0, -2.0)
    assert [p.id for p in ranked.passages] == ["b", "c", "a"], "equals keep the retriever's order"
    assert ranked.scores == (1.0, 0.0, 0.0)
    (plain,) = Contexts(listed, listed, None, 2).ranked([Question("q?", ())])
    assert plain.passages == plain.retrieved == (PASSAGES["c"], PASSAGES["a"])


def test_slices_are_reported_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, questions = Listed(), [Question(f"q{i}?", ()) for i in range(5)]
    whole = Contexts(listed, listed, Likes("Madrid"), 3).ranked(questions)
    monkeypatch.setattr("shoulders.reader.contexts.SLICE", 2)
    seen: list[int] = []
    assert Contexts(listed, listed, Likes("Madrid"), 3).ranked(questions, seen.append) == whole
    assert seen == [2, 2, 1]


def test_questions_may_bring_their_own_passages() -> None:
    own = (Passage("", "", "one"), Passage("", "", "two Paris"), Passage("", "", "three"))
    question = Question("q?", (), None, own, (3.0, 2.0, 1.0))
    (ranked,) = Contexts(None, None, Likes("Paris"), 2).ranked([question])
    assert [p.text for p in ranked.passages] == ["two Paris", "one"]
    assert len({p.id for p in ranked.passages}) == 2
    with pytest.raises(DataError, match="'q2\\?' brings no passages"):
        Contexts(None, None, None, 2).ranked([question, Question("q2?", ())])


def test_passages_of_one_id_stay_two_passages() -> None:
    own = (Passage("x", "", "one"), Passage("x", "", "two Paris"))
    question = Question("q?", (), None, own, (2.0, 1.0))
    (ranked,) = Contexts(None, None, Likes("Paris"), 2).ranked([question])
    assert ranked.retrieved == own
    assert ranked.passages == (own[1], own[0])
    (plain,) = Contexts(None, None, None, 2).ranked([question])
    assert plain.passages == own


def test_every_stage_is_scored() -> None:
    questions = [
        Question("capital of France?", ("Paris", "Lutetia")),
        Question("capital of Spain?", ("Madrid",)),
        Question("who?", ("nobody known",)),
    ]
    says = Says({"Spain?": ("\nThe Madrid!", -1.0), "France?": ("in Paris", -1.0), "": ("no", 0)})
    reader = reader_of(says, Likes("Paris"), pack={"passages": 2})
    searched: list[int] = []
    read: list[int] = []
    card = report_card(reader, questions, on_search=searched.append, on_read=read.append)
    third = 100 / 3
    expected = {
        "exact_match": third,  # SQuAD's: articles and punctuation do not count
        "f1": 100 * (2 / 3 + 1) / 3,
        "retrieved_answer_hit_at_1": 0,
        "retrieved_answer_hit_at_4": 2 * third,
        "retrieved_answer_hit_at_20": 2 * third,
        "reranked_answer_hit_at_1": third,
        "reranked_answer_hit_at_4": 2 * third,
        "reranked_answer_hit_at_20": 2 * third,
        "packed_answer_hit": third,  # b and a are packed: Paris is in, Madrid is not
        "packed_passages": 2,
        "abstained": 0,
        "exact_match_given_packed": 0,
        "f1_given_packed": 100 * 2 / 3,
    }
    assert card.metrics == pytest.approx(expected)
    assert set(card.ci95) == set(expected)
    low, high = card.ci95["exact_match"]
    assert low <= third <= high
    assert (searched, read) == ([3], [3])
    assert says.texts[0] == (
        "France\nIts capital is Paris.\n\nRome is old.\n\nQuestion: capital of France?"
    )
    with pytest.raises(DataError, match=r"question 'x\?' has no answers"):
        report_card(reader, [questions[0], Question("x?", ())])


def test_more_passages_than_a_hundred_are_counted_too() -> None:
    own = tuple(Passage(str(i), "", "word") for i in range(150))
    questions = [Question("q?", ("word",), None, own[:n], (0.0,) * n) for n in (150, 50)]
    contexts = Contexts(None, None, None, k=150)
    config = ReadingConfig.model_validate({"pack": {"passages": 150}})
    card = report_card(Reader(Says({"": ("word", 0)}), contexts, config), questions)  # type: ignore[arg-type]
    assert card.metrics["packed_passages"] == pytest.approx(100)
    # Drawn twice out of two, made as wide as two rows allow, and no more than 150.
    assert card.ci95["packed_passages"] == pytest.approx((100 - 50 * 2**0.5, 150))


def test_a_reader_abstains_below_its_confidence() -> None:
    questions = [Question("sure?", ("yes",)), Question("unsure?", ("yes",))]
    says = Says({"unsure?": ("yes", -8.0), "sure?": ("yes", -0.2)})
    confidence = Confidence(bias=2.0, answer=1.0, passage=0.5)
    reader = reader_of(says, Likes("Paris"), confidence=confidence, abstain_below=0.5)
    sure, unsure = reader.answer(questions)
    # two tokens each; the best passage scores 1
    assert sure.confidence == pytest.approx(1 / (1 + 2.718281828 ** -(2 - 0.1 + 0.5)))
    assert (sure.text, sure.abstained) == ("yes", False)
    assert (unsure.text, unsure.proposed, unsure.abstained) == (NO_ANSWER, "yes", True)
    card = report_card(reader, questions)
    assert card.metrics["abstained"] == 50
    assert card.metrics["exact_match"] == 50


def test_what_is_written_to_be_read_again_has_the_retrievers_scores() -> None:
    a, b, c = (Passage(name, "", name) for name in "abc")
    ranked = Ranked((a, b, c), (9.0, 8.0, 7.0), (c, a, b), (0.9, 0.5, 0.1))
    assert ranked.found_scores() == [7.0, 9.0, 8.0]


def test_answers_and_plot_are_written(tmp_path: Path) -> None:
    questions = [Question("capital of France?", ("Paris",))]
    card = report_card(reader_of(Says({"": ("Paris", -1.0)})), questions)
    dump_answers(tmp_path / "a.jsonl", questions, card.answers)
    (line,) = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    entry = json.loads(line)
    assert entry["packed"] == ["a", "b", "c"]
    assert (entry["exact_match"], entry["packed_answer_hit"]) == (1.0, True)
    plot_report_card(card.metrics, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_real_skill_reads_what_fits(arch: str, tiny_lm: Callable[[str], FrozenLM]) -> None:
    skill = Skill.base(tiny_lm(arch))
    config = ReadingConfig(pack=PackConfig(tokens=None), max_new_tokens=5)
    long = {str(i): Passage(str(i), "", "one two three. " * 9) for i in range(40)}

    class Many(Listed):
        def passages(self, ids: Sequence[str]) -> list[Passage]:
            return [long[i] for i in ids]

    many = Many()
    many.order = list(long)
    reader = Reader(skill, Contexts(many, many, None, 40), config)
    (answer,) = reader.answer([Question("who?", ())])
    packed = answer.packed
    assert packed.left_out
    assert packed.text.endswith("Question: who?")
    used = len(skill.input_ids([packed.text], answer_room=5)[0])
    assert used + 5 <= skill.lm.max_positions
    assert used + 5 + skill.count_tokens("one two three. ") > skill.lm.max_positions - 2
    streamed = [d.completion for d in reader.stream(packed) if d.completion]
    assert len(streamed) == 1
    assert reader.judged(streamed[0], answer.ranked, packed).text == answer.text
    endless = Question("who is that " * 400, (), where="q.jsonl:7")
    with pytest.raises(WindowError, match=r"^q\.jsonl:7: question 'who is .* shorten it"):
        reader.answer([Question("who?", ()), endless])


def test_rows_to_select_on_are_neither_dropped_nor_narrowed(lm: FrozenLM, tmp_path: Path) -> None:
    questions = [Question("q1", ("rome", "roma")), Question("q2", ("oslo",))]
    passage = Passage("p", "t", "it lies in rome")
    ranked = [Ranked((passage,), (1.0,), (passage,), (1.0,))] * 2
    made = SimpleNamespace(reader=SimpleNamespace(reading=ReadingConfig(), unanswerable="drop"))
    for taught, targets in ((True, [["rome"]]), (False, [["rome", "roma"], ["oslo"]])):
        file = tmp_path / "rows.jsonl"
        write_contexts(file, Skill.base(lm), cast(Any, made), questions, ranked, taught=taught)
        assert [json.loads(x)["targets"] for x in file.read_text().splitlines()] == targets

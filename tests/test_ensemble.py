"""Ensembles, against the mean of what members say of one row alone and without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoulders.errors import LMError, ShouldersError
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.skills import ensemble as ensemble_module
from shoulders.skills.config import SkillConfig
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.skill import Skill

TEXTS = ["The capital of Norway", "one two three four five six seven eight", "who", "Is it Oslo?"]
GREEDY = DecodingConfig(max_new_tokens=6)
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "static_lowrank", "length": 3, "rank": 4, "init": {"source": "vocabulary"}},
    {"kind": "static_kv", "length": 5, "init": {"source": "vocabulary"}},
    {"kind": "static", "length": 2, "init": {"source": "vocabulary"}},
)


def no_encoder(name: str) -> Any:
    raise AssertionError(f"no encoder is needed, asked for {name}")


def member(lm: FrozenLM, number: int, **form: Any) -> Skill:
    """Return a skill whose trained values are all moved off where they begin."""
    config = SkillConfig.model_validate({"passes": [{"prompt": KINDS[number]}], "format": form})
    random = torch.Generator().manual_seed(number)
    skill = Skill.create(lm, config, no_encoder, random)
    assert skill.trained is not None
    with torch.no_grad():
        for value in skill.trained.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=random))
    return skill


def three(lm: FrozenLM) -> Ensemble:
    """Return members with prompts of three forms and lengths, one of which reads another format."""
    return Ensemble([member(lm, 0), member(lm, 1, separator=" so:"), member(lm, 2)])


def plainly(ensemble: Ensemble, text: str, answer: list[int]) -> Tensor:
    """Return the log of the mean probabilities after each token of an answer, `[n + 1, v]`."""
    found = []
    for one in ensemble.members:
        (ids,) = one.input_ids([text])
        # Scored alone, member by member: the whole row is read again for every token.
        rows = []
        for k in range(len(answer) + 1):
            read = ids + answer[:k]
            prompt = one.prompt([text])
            rows.append(_last_logits(one.lm, prompt, read).double().softmax(-1))
        found.append(torch.stack(rows))
    return torch.stack(found).mean(0).log()


@torch.no_grad()
def _last_logits(lm: FrozenLM, prompt: Any, ids: list[int]) -> Tensor:
    from shoulders.lm.combine import combine

    batch = combine(lm, prompt, [ids])
    hidden = lm.hidden(
        batch.embeddings, batch.mask, batch.positions, batch.cache, updates=prompt.updates
    )
    return lm.logits(hidden[:, -1])[0]


def test_greedy_answers_are_those_of_the_mean(lm: FrozenLM) -> None:
    ensemble = three(lm)
    answers = ensemble.generate(TEXTS, GREEDY)
    for text, (found,) in zip(TEXTS, answers, strict=True):
        logprobs = plainly(ensemble, text, found.token_ids)[:-1]
        places = torch.arange(len(found.token_ids))
        said = logprobs[places, torch.tensor(found.token_ids)]
        assert found.token_ids == logprobs.argmax(-1).tolist()
        assert found.logprob == pytest.approx(float(said.sum()), abs=2e-4)


def test_members_alone_answer_otherwise(tiny_lm: Any) -> None:
    ensemble = three(tiny_lm("llama"))
    together = [own[0].token_ids for own in ensemble.generate(TEXTS, GREEDY)]
    alone = [[own[0].token_ids for own in one.generate(TEXTS, GREEDY)] for one in ensemble.members]
    assert all(own != together for own in alone)


def test_scores_are_those_of_the_mean(lm: FrozenLM) -> None:
    ensemble = three(lm)
    options = [["Paris", "Oslo is it"], ["nine"], ["nobody", "the author", "x"], ["yes", "no"]]
    for text, own, scores in zip(TEXTS, options, ensemble.score(TEXTS, options), strict=True):
        for ids, score in zip(ensemble.members[0].answer_ids(own), scores, strict=True):
            logprobs = plainly(ensemble, text, ids)[:-1]
            wanted = logprobs[torch.arange(len(ids)), torch.tensor(ids)]
            assert score.logprob == pytest.approx(float(wanted.sum()), abs=2e-4)
            assert score.tokens == len(ids)
            assert score.greedy == (logprobs.argmax(-1).tolist() == ids)


@pytest.mark.parametrize("keep", [None, "end"])
@pytest.mark.parametrize("several", [False, True])
def test_a_score_does_not_depend_on_other_rows_candidates(
    tiny_lm: Any, keep: Any, several: bool
) -> None:
    """Each row leaves room for its own longest candidate, not for a neighbour's."""
    lm = tiny_lm("llama")
    asked = member(lm, 1, keep=keep)
    asked = Ensemble([asked, member(lm, 2, keep=keep)]) if several else asked
    text, other = TEXTS[1], TEXTS[2]
    free = lm.max_positions - len(member(lm, 1).input_ids([text])[0]) - 5
    long = "x"
    while len(member(lm, 1).answer_ids([long])[0]) <= free:  # beside it `text` would not fit
        long += " x"
    if keep is not None:
        text *= 20
    options = [["yes", "no"], [long]]
    (alone,) = asked.score([text], options[:1])
    beside = asked.score([text, other], options)[0]
    assert [s.logprob for s in beside] == pytest.approx([s.logprob for s in alone], abs=1e-4)


def test_no_candidates_have_no_scores(tiny_lm: Any) -> None:
    skill = member(tiny_lm("llama"), 2)
    assert skill.score(["a"], [[]]) == [[]]
    with pytest.raises(ShouldersError, match="give a list of texts"):
        skill.score(["a"], ["paris"])


def test_an_lm_without_an_end_token_teaches_no_answers(
    tiny_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    skill = member(tiny_lm("llama"), 2)
    monkeypatch.setitem(skill.lm.__dict__, "end_ids", ())
    assert skill.generate(["a"], GREEDY)
    with pytest.raises(LMError, match="no end token"):
        skill.score(["a"], [["b"]])


def test_all_members_rows_count_as_read_together(
    tiny_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch holds whole rows of every member, and of every candidate where they are scored."""
    ensemble = three(tiny_lm("llama"))
    options = [["yes", "no"]] * len(TEXTS)
    wanted = ensemble.score(TEXTS, options)
    read: list[int] = []
    embed = FrozenLM.embed_rows

    def counted(lm: FrozenLM, rows: Any) -> Tensor:
        read.append(sum(map(len, rows)))
        return embed(lm, rows)

    monkeypatch.setattr(FrozenLM, "embed_rows", counted)
    monkeypatch.setattr(ensemble_module, "BATCH_TOKENS", 200)
    told: list[int] = []
    found = ensemble.score(TEXTS, options, on_rows=told.append)
    for mine, own in zip(found, wanted, strict=True):
        assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in own], abs=1e-4)
    assert max(read) <= 200 < sum(read)
    assert sum(told) == len(TEXTS)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_does_not_depend_on_its_batch(tiny_lm: Any, temperature: float) -> None:
    ensemble = three(tiny_lm("qwen2"))
    decoding = DecodingConfig(max_new_tokens=8, n=2, temperature=temperature)
    # Rows leave at different times: each at what it says third.
    said = [own[0].text[2] for own in ensemble.generate(TEXTS[1:3], decoding)]
    decoding = decoding.model_copy(update={"stop": tuple(said)})
    both = ensemble.generate(TEXTS, decoding)
    assert len({len(c.token_ids) for own in both for c in own}) > 1
    for text, own in zip(TEXTS, both, strict=True):
        (alone,) = ensemble.generate([text], decoding)
        assert [c.token_ids for c in alone] == [c.token_ids for c in own]


def test_an_ensemble_of_one_skill_twice_is_that_skill(tiny_lm: Any) -> None:
    one = member(tiny_lm("gpt2"), 1)
    for (wanted,), (found,) in zip(
        one.generate(TEXTS, GREEDY), Ensemble([one, one]).generate(TEXTS, GREEDY), strict=True
    ):
        assert found.token_ids == wanted.token_ids
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_streamed_pieces_are_the_answer(tiny_lm: Any) -> None:
    ensemble = three(tiny_lm("llama"))
    deltas = list(ensemble.stream(TEXTS[0], GREEDY))
    (wanted,) = ensemble.generate(TEXTS[:1], GREEDY)[0]
    assert "".join(d.text for d in deltas) == wanted.text
    assert deltas[-1].completion is not None
    assert deltas[-1].completion.text == wanted.text


def test_what_is_no_ensemble_is_refused(tiny_lm: Any, fresh_lm: Any) -> None:
    lm = tiny_lm("llama")
    one = member(lm, 1)
    with pytest.raises(ShouldersError, match="two members or more, this has 1"):
        Ensemble([one])
    with pytest.raises(ShouldersError, match="member 2 of the ensemble is on another LM"):
        Ensemble([one, member(fresh_lm("llama"), 1)])
    with pytest.raises(ShouldersError, match="begins answers with '='"):
        Ensemble([one, member(lm, 0, answer_prefix="=")])
    passes = [{"link": {"layers": 1, "width": 16, "heads": 2}}, {"prompt": KINDS[1]}]
    config = SkillConfig.model_validate({"passes": passes})
    linked = Skill.create(lm, config, no_encoder, torch.Generator().manual_seed(0))
    with pytest.raises(ShouldersError, match="member 2 of the ensemble has several passes"):
        Ensemble([one, linked])
    with pytest.raises(ShouldersError, match="give a list of texts"):
        three(lm).generate("one text", GREEDY)

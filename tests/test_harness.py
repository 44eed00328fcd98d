"""lm-evaluation-harness: our model's numbers beside its transformers backend's, and with skills."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tokenizers import processors

from shoulders.benchmark.contender import peer_lm
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.errors import ShouldersError, WindowError
from shoulders.evaluation.harness import options
from shoulders.evaluation.harness.model import HarnessModel
from shoulders.evaluation.harness.options import opened
from shoulders.evaluation.harness.registration import register
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.load import load_lm
from shoulders.skills.artefact import save_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from tiny_models import environment, save_tiny_encoder, save_tiny_lm, tiny_tokenizer, write_jsonl

CHOICES = ("paris", "madrid", "two", "no such thing at all")
WORDS = "the capital of spain is madrid and the number three is a word of five letters "
# Its cache mixes up windows of equal tokens that are cut at different places (0.4.13).
HF = {"dtype": "float32", "logits_cache": False}
CONTEXTS = ("answer the question", "the capital of france is ", "", "write\n\n", "the number two ")
CONTINUATIONS = (" paris", "madrid", " two words please", "\nand")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module", params=["plain", "bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny LM, whose tokenizer begins texts with a token of its own or does not."""
    folder = save_tiny_lm(tmp_path_factory.mktemp("harness") / "lm")
    if request.param == "bos":
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        first = ("<s>", tokenizer.bos_token_id)
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[first]
        )
        tokenizer.save_pretrained(folder)
    return folder


def tasks(folder: Path, rows: int = 12) -> list[dict[str, Any]]:
    """Write a data set, and return a task of each of the harness's three kinds over it."""
    values = [
        {
            "question": f"{WORDS[: 7 * i % 40]}what is number {i}? ",
            "choices": list(CHOICES),
            "answer": i % 4,
            "text": WORDS * (i + 1),
            "said": CHOICES[i % 4],
        }
        for i in range(rows)
    ]
    file = write_jsonl(folder / "rows.jsonl", values)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
    }
    asked = "Question: {{question}}\nAnswer:"
    return [
        {
            **common,
            "task": "choose",
            "output_type": "multiple_choice",
            "doc_to_text": asked,
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            **common,
            "task": "roll",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        {
            **common,
            "task": "say",
            "output_type": "generate_until",
            "doc_to_text": asked,
            "doc_to_target": "{{said}}",
            "generation_kwargs": {"until": ["\n", "th"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


def run(model: str, arguments: dict[str, Any], wanted: Sequence[Any], **options: Any) -> Any:
    register()
    # To read the thousands of tasks that come with the harness takes twelve seconds.
    own = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(wanted),
        task_manager=own,
        device="cpu",
        bootstrap_iters=0,
        **options,
    )


def responses(found: Any, task: str) -> list[Any]:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


def metrics(found: Any, task: str) -> dict[str, float]:
    values = found["results"][task].items()
    return {name: v for name, v in values if isinstance(v, float) and "stderr" not in name}


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compare metrics, likelihoods (within 1e-3), first choices and answers, row by row."""
    for task in ("choose", "roll", "say"):
        found, wanted = metrics(ours, task), metrics(theirs, task)
        assert found.keys() == wanted.keys()
        assert found
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-4), (task, name)
    for mine, other in zip(responses(ours, "choose"), responses(theirs, "choose"), strict=True):
        for [(logprob, greedy)], [(expected, first)] in zip(mine, other, strict=True):
            assert logprob == pytest.approx(expected, abs=1e-3)
            assert greedy == first
    for [[mine]], [[other]] in zip(responses(ours, "roll"), responses(theirs, "roll"), strict=True):
        assert mine == pytest.approx(other, abs=1e-3 * max(1.0, abs(other) / 100))
    assert responses(ours, "say") == responses(theirs, "say")


@pytest.mark.parametrize("batch", ["auto", 3])
def test_without_a_skill_it_is_the_transformers_backend(
    folder: Path, tmp_path: Path, batch: int | str
) -> None:
    wanted = tasks(tmp_path)
    theirs = run("hf", {"pretrained": str(folder), **HF}, wanted, batch_size=4)
    ours = run("shoulders", {"lm": str(folder), "dtype": "float32"}, wanted, batch_size=batch)
    assert_equal(ours, theirs)
    said = responses(ours, "say")
    assert len({str(answer) for answer in said}) > 3, "the answers must depend on the question"
    assert ours["config"]["lm_fingerprint"] == load_lm(str(folder)).fingerprint


def test_requests_as_the_backend_reads_them(folder: Path) -> None:
    """Trailing spaces, no context, first choices, contexts and texts beyond the window."""
    theirs = get_model("hf")(pretrained=str(folder), device="cpu", **HF)
    ours = HarnessModel(lm=str(folder), dtype="float32")
    pairs = [(c, a) for c in CONTEXTS for a in CONTINUATIONS]
    pairs += [(WORDS * 6, " madrid"), (WORDS * 6, " paris")]
    first = theirs.tokenizer.decode(theirs.prefix_token_id)
    pairs += [(f"{first}the capital", " of spain")]
    for end in range(5, 75):  # contexts with the LM's first choice behind them
        context = WORDS[:end].rstrip()
        ids = theirs.tok_encode(context)
        with torch.no_grad():
            best = int(theirs.model(torch.tensor([ids])).logits[0, -1].argmax())
        pair = (context, theirs.tokenizer.decode(best))
        if pair[1].strip() and theirs._encode_pair(*pair)[1] == [best]:
            pairs.append(pair)
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found, wanted = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in wanted], abs=1e-3)
    assert [one[1] for one in found] == [one[1] for one in wanted]
    assert any(one[1] for one in wanted)
    lengths = [*range(1, 70, 9), 300]
    texts = [Instance("loglikelihood_rolling", {}, (WORDS * n,), 0) for n in lengths]
    texts.append(Instance("loglikelihood_rolling", {}, ("",), 0))
    found, wanted = ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts)
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-3)
    how = {"until": ["th"], "max_gen_toks": 20}
    said = [Instance("generate_until", {}, (text, how), 0) for text in (*CONTEXTS[:2], WORDS * 9)]
    assert ours.generate_until(said) == theirs.generate_until(said)


# -- skills ------------------------------------------------------------------------------

PASSES: dict[str, list[dict[str, Any]]] = {
    "static": [{"prompt": {"kind": "static", "length": 4}}],
    "idpt_kv": [{"prompt": {"kind": "idpt_kv", "length": 2}}],
    "neural": [
        {"link": {"heads": 2, "skip": False}},
        {"prompt": {"kind": "static", "length": 4}},
    ],
    "textual": [
        {"propose": {"n": 2, "max_new_tokens": 4}},
        {"prompt": {"kind": "static", "length": 4}},
    ],
    "majority": [
        {"propose": {"n": 2, "max_new_tokens": 4, "chooser": "majority"}},
        {"prompt": {"kind": "static", "length": 4}},
    ],
}


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return skills of several kinds on one tiny LM, their values drawn as if trained."""
    root = tmp_path_factory.mktemp("skills")
    lm = load_lm(str(save_tiny_lm(root / "lm")), dtype="float32")
    encoder = save_tiny_encoder(root / "encoder")
    generator = {"encoder": str(encoder), "width": 16, "heads": 2, "layers": 1}
    for name, passes in PASSES.items():
        own = json.loads(json.dumps(passes))
        if name == "idpt_kv":
            own[0]["prompt"]["generator"] = generator
        config = SkillConfig.model_validate({"passes": own})
        random = torch.Generator().manual_seed(1)
        skill = Skill.create(lm, config, functools.cache(load_encoder), random)
        with torch.no_grad():
            for network in skill.networks():
                for value in network.parameters():
                    value += 0.3 * torch.randn(value.shape, generator=random)
        save_skill(skill, root / name, Templates(), {})
    return {name: root / name for name in PASSES}


@pytest.mark.parametrize("name", ["static", "idpt_kv", "neural", "textual"])
@pytest.mark.parametrize("batch", ["auto", 2])
def test_a_skill_scores_as_it_does_elsewhere(
    skills: dict[str, Path], name: str, batch: int | str
) -> None:
    model = HarnessModel(skill=str(skills[name]), batch_size=batch)
    # The tiny encoder has no special tokens: of an empty text it would have nothing to read.
    contexts = [text for text in CONTEXTS if text or name != "idpt_kv"]
    pairs = [(context, answer) for context in contexts for answer in CONTINUATIONS]
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    answers = [[a.lstrip() for a in CONTINUATIONS]] * len(contexts)
    expected = [s for own in model.skill.score(contexts, answers) for s in own]
    assert [one[0] for one in found] == pytest.approx([s.logprob for s in expected], abs=1e-3)
    bare = HarnessModel(lm=model.skill.lm.name, dtype="float32", format="skill")
    same = SkillConfig(format=model.skill.config.format)
    bare.skill = Skill(bare.skill.lm, same)
    without = bare.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    differences = [abs(a[0] - b[0]) for a, b in zip(found, without, strict=True)]
    assert min(differences) > 1e-3, "the skill must count"

    how = {"until": ["th"], "max_gen_toks": 6}
    asked = [Instance("generate_until", {}, (text, how), 0) for text in contexts]
    decoding = DecodingConfig(max_new_tokens=6, stop=("th",))
    said = [own[0].text for own in model.skill.generate(contexts, decoding)]
    assert model.generate_until(asked) == said


@pytest.mark.parametrize("name", ["static", "idpt_kv", "neural"])
def test_plainly_tokens_stand_behind_the_prompt(skills: dict[str, Path], name: str) -> None:
    """The continuation's tokens behind the context's, no separator, no end, one row at a time."""
    model = HarnessModel(skill=str(skills[name]), format="plain")
    skill, lm = model.skill, model.skill.lm
    pairs = [(context, answer) for context in CONTEXTS if context for answer in CONTINUATIONS]
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, answer), (logprob, _) in zip(pairs, found, strict=True):
        stripped = context.rstrip()
        before, whole = lm.tokenize([stripped, context + answer])
        wanted = whole[len(before) :]
        total, ids = 0.0, list(before)
        for token in wanted:
            total += _next_logprob(skill, context, ids, token)
            ids.append(token)
        assert logprob == pytest.approx(total, abs=1e-3)
    long = [Instance("loglikelihood", {}, (WORDS * 9, " madrid"), 0)]
    assert math.isfinite(model.loglikelihood(long)[0][0])


def _next_logprob(skill: Skill, text: str, ids: list[int], token: int) -> float:
    """Return a token's log-likelihood from a pass over the whole row, without any cache."""
    from shoulders.lm.states import states

    with torch.no_grad():
        embedded = skill.embedded([text], [ids])
        if embedded is None:
            embedded = skill.lm.embed_rows([ids])
        read = states(skill.lm, skill.prompt([text]), embedded, [len(ids)])
        logits = skill.lm.logits(read.values[read.starts[0] + len(ids) - 1][None])
    return float(torch.log_softmax(logits, -1)[0, token])


def test_running_text_through_a_skill_is_our_perplexity(
    skills: dict[str, Path], tmp_path: Path
) -> None:
    from shoulders.training.running_text import RunningText, perplexity

    (tmp_path / "text.txt").write_text(WORDS)
    for name in ("static", "neural"):
        model = HarnessModel(skill=str(skills[name]))
        (found,) = model.loglikelihood_rolling([Instance("r", {}, (WORDS,), 0)])
        text = RunningText(model.skill.lm, [str(tmp_path / "text.txt")], 1000)
        (example,) = text.examples()
        example.input_ids[:0] = [model.prefix_token_id]
        example.answer_ids[:0] = [example.input_ids.pop()]
        expected = perplexity(model.skill, [example])
        assert found == pytest.approx(-expected.loss * expected.tokens, abs=1e-2)


def test_a_skill_on_the_hub_is_fetched(
    skills: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = str(next(iter(skills.values())))
    monkeypatch.setattr(options, "local", {"hf://me/skill": found}.__getitem__)
    assert opened("hf://me/skill", None, None, "cpu").trained is not None


def test_what_is_not_defined_is_refused(skills: dict[str, Path], tmp_path: Path) -> None:
    asked = [Instance("loglikelihood", {}, ("a", " b"), 0)]
    textual = HarnessModel(skill=str(skills["textual"]))
    with pytest.raises(ShouldersError, match="no running text"):
        textual.loglikelihood_rolling([Instance("r", {}, ("a",), 0)])
    with pytest.raises(ShouldersError, match="no likelihoods"):
        HarnessModel(skill=str(skills["majority"])).loglikelihood(asked)
    with pytest.raises(ShouldersError, match="leave out plain"):
        HarnessModel(skill=str(skills["textual"]), format="plain")
    with pytest.raises(ShouldersError, match="--apply_chat_template"):
        textual.apply_chat_template([{"role": "user", "content": "a"}])
    with pytest.raises(ShouldersError, match=r"skil: unknown; there are skill"):
        HarnessModel(skil="x")
    with pytest.raises(ShouldersError, match="format=own"):
        HarnessModel(format="own")
    with pytest.raises(ShouldersError, match="batch_size=many"):
        HarnessModel(batch_size="many")
    (tmp_path / "reader.json").write_text("{}")
    with pytest.raises(ShouldersError, match="shoulders eval"):
        HarnessModel(skill=str(tmp_path))
    static = HarnessModel(skill=str(skills["static"]), format="plain")
    for model in (static, HarnessModel(skill=str(skills["static"]))):
        for how, error in (
            ({"until": [], "num_beams": 4}, "num_beams"),
            ({"until": [], "max_gen_toks": 400}, "max_gen_toks=400"),
        ):
            with pytest.raises(ShouldersError, match=error):
                model.generate_until([Instance("g", {}, ("a", how), 0)])
    with pytest.raises(WindowError, match="156 fit"):
        static.loglikelihood([Instance("loglikelihood", {}, ("a", WORDS * 9), 0)])


def test_repeated_requests_are_other_samples(skills: dict[str, Path]) -> None:
    how = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    asked = [Instance("g", {}, ("the capital", how), 0) for _ in range(4)]
    for form in ("plain", "skill"):
        model = HarnessModel(skill=str(skills["static"]), format=form)
        said = model.generate_until(asked)
        assert len(set(said)) == 4
        assert said == model.generate_until(asked)
        other = HarnessModel(skill=str(skills["static"]), format=form, seed=7)
        assert said != other.generate_until(asked)


def test_the_chat_template_is_the_lms(tmp_path: Path) -> None:
    folder = save_tiny_lm(tmp_path / "lm")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|end|>assistant: {% endif %}"
    )
    wanted = [task for task in tasks(tmp_path) if task["task"] != "roll"]
    options = {"apply_chat_template": True, "num_fewshot": 0}
    theirs = run("hf", {"pretrained": str(folder), **HF}, wanted, **options)
    ours = run("shoulders", {"lm": str(folder), "dtype": "float32"}, wanted, **options)
    for task in ("choose", "say"):
        assert metrics(ours, task) == metrics(theirs, task)
    assert responses(ours, "say") == responses(theirs, "say")
    first = ours["samples"]["choose"][0]["arguments"][0][0]
    assert first.startswith("<|end|>user: Question")


def test_importing_the_package_imports_no_harness() -> None:
    code = "import sys, shoulders, shoulders.cli.app; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the command line, and the embedded LM -----------------------------------------------


def command(folder: Path, wanted: Sequence[dict[str, Any]], *options: str) -> Any:
    """Run `shoulders harness` on tasks that stand in a folder of their own; return its results."""
    place = folder / "tasks"
    place.mkdir()
    for task in wanted:
        (place / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    done = subprocess.run(
        [
            sys.executable, "-m", "shoulders", "harness", "run", "--model", "shoulders",
            "--tasks", ",".join(task["task"] for task in wanted), "--include_path", str(place),
            "--output_path", str(folder / "out.json"), "--log_samples", *options,
        ],
        env=environment(Path(os.environ.get("SHOULDERS_CACHE") or folder / "cache"))
        | {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = folder.glob("out*.json")
    return json.loads(written.read_text())


@pytest.mark.slow
def test_the_command_line(skills: dict[str, Path], tmp_path: Path) -> None:
    wanted = tasks(tmp_path)
    arguments = {"skill": str(skills["static"])}
    expected = run("shoulders", arguments, wanted)
    static = f"skill={skills['static']}"
    found = command(tmp_path, wanted, "--model_args", static, "--batch_size", "auto")
    for task in ("choose", "roll", "say"):
        assert metrics(found, task) == pytest.approx(metrics(expected, task), rel=1e-4)
    assert found["config"]["skill"] == str(skills["static"])


@pytest.mark.slow
def test_the_embedded_lm_is_the_transformers_backend(embedded_lm: Any, tmp_path: Path) -> None:
    wanted = tasks(tmp_path, rows=6)
    ours = run("shoulders", {"lm": "embedded", "dtype": "float32"}, wanted)
    name = peer_lm("embedded")
    # In float64: the backend's own sums in float32 are off by up to 2e-3 on some processors.
    theirs = run("hf", {"pretrained": name, **HF, "dtype": "float64"}, wanted, batch_size=4)
    assert_equal(ours, theirs)

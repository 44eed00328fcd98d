"""The verdict in words, written from the numbers alone; fine-tuning may win."""

from __future__ import annotations

from collections.abc import Sequence

from shoulders.comparison.summary import Difference, Line, best, difference, rests_on, without

FEW_ROWS = 100
FEW_TASKS = 0.2  # a lead that at most this share of the tasks makes is said to rest on them
NOTICEABLE = 0.01  # share by which perplexity must rise to be called forgetting


def verdict(lines: Sequence[Line], base_perplexity: float | None, digest_equal: bool) -> list[str]:
    """Return sentences: a recommendation first, then what it rests on.

    Args:
        lines: every method.
        base_perplexity: of the LM before anything was tuned.
        digest_equal: whether the frozen LM is what it was, bit by bit.
    """
    family = {f: [x for x in lines if x.family == f] for f in ("bare", "frozen", "tuned")}
    bare, frozen, tuned = (best(family[f]) for f in ("bare", "frozen", "tuned"))
    trained = best([*family["frozen"], *family["tuned"]])
    gain = difference(trained, bare) if trained and bare else None
    said = []
    if lines and not any(line.exact_match for line in lines):
        return [_nothing_exact(lines), *_forgetting(family["tuned"], base_perplexity, digest_equal)]
    if bare and not trained:
        said.append(f"{bare.name} answers best: {_score(bare)} exact match. Nothing was trained.")
    elif bare and trained and gain and gain.sure <= 0:
        than = "is better than" if gain.sure < 0 else "is not surely beaten by"
        said.append(f"Train nothing yet: {bare.name} ({_score(bare)}) {than} the best trained "
                    f"method, {trained.name} ({gain}).")  # fmt: skip
    if frozen and tuned:
        gap = difference(frozen, tuned)
        if gain is None or gain.sure > 0:
            said.append(_recommended(frozen, tuned, gap))
        said.append(_which(frozen, tuned, gap))
        said += _few_tasks(frozen, tuned, gap)
    elif trained and (gain is None or gain.sure > 0):
        said.append(f"Use {trained.name}: {_score(trained)} exact match, the best that was tried.")
    if bare and trained and gain and gain.sure > 0:
        said.append(f"Training pays: {trained.name} beats {bare.name} by {gain}.")
    said += _picked(family["frozen"], family["tuned"])
    said += _more_parameters(lines)
    said += _cheaper(family["frozen"], frozen)
    said += _forgetting(family["tuned"], base_perplexity, digest_equal)
    rows = sum(len(scores) for scores in lines[0].scores.values()) if lines else 0
    if rows < FEW_ROWS:
        said.append(f"Only {rows} rows were tested, so intervals are wide: more rows, surer words.")
    return said


def _nothing_exact(lines: Sequence[Line]) -> str:
    by_f1 = sorted((x for x in lines if x.f1 is not None), key=lambda x: -(x.f1 or 0.0))
    told = ", ".join(f"{x.name} {x.f1:.1f}" for x in by_f1)
    return (
        "No answer is exactly a target, so that exact match cannot tell these methods apart; "
        f"F1, without intervals: {told or 'not measured'}."
    )


def _picked(frozen: Sequence[Line], tuned: Sequence[Line]) -> list[str]:
    """The best of several is the luckier one, too; and a seed is a draw as rows are."""
    if not frozen or not tuned:
        return []
    seeds = {len(line.by_seed) for line in (best(frozen), best(tuned)) if line is not None}
    counted = " and ".join(str(n) for n in sorted(seeds)) + (" seed" if seeds == {1} else " seeds")
    return [
        f"Intervals draw test rows anew, and leave two things out: the best of {len(frozen)} "
        f"frozen and of {len(tuned)} tuned was picked on these rows, and each was trained with "
        f"{counted}; another may differ by a point or two."
    ]


def _recommended(frozen: Line, tuned: Line, gap: Difference) -> str:
    if gap.sure < 0:
        return (
            f"Fine-tuning wins here: use {tuned.name}, if weights of its own for every task, and "
            f"what the LM forgets with them in, can be afforded; of the frozen methods "
            f"{frozen.name} comes nearest."
        )
    if gap.word == "undecided":
        return (
            f"Undecided between {frozen.name} around the frozen LM and the best fine-tuning, "
            f"{tuned.name}: begin with {frozen.name}, which leaves the LM as it is; more test rows "
            "or seeds will tell."
        )
    reason = "it beats" if gap.sure > 0 else "it is level with"
    return f"Use {frozen.name} around the frozen LM: {reason} the best fine-tuning, {tuned.name}."


def _which(frozen: Line, tuned: Line, gap: Difference) -> str:
    read = ""
    if frozen.examples_read != tuned.examples_read:
        read = f"{frozen.examples_read} and {tuned.examples_read} examples, "
    return (
        f"{frozen.name} {_score(frozen)} against {tuned.name} {_score(tuned)}: {gap}, {gap.word}; "
        f"{frozen.trained_parameters:,} and {tuned.trained_parameters:,} trained parameters, "
        f"{read}{frozen.training_seconds:.0f} and {tuned.training_seconds:.0f} s of training, "
        f"{frozen.latency_ms:.0f} and {tuned.latency_ms:.0f} ms an answer."
    )


def _few_tasks(frozen: Line, tuned: Line, gap: Difference) -> list[str]:
    """A lead that a few tasks make is worth less to a reader who has others."""
    if not gap.sure:
        return []
    ahead, behind = (frozen, tuned) if gap.sure > 0 else (tuned, frozen)
    tasks = rests_on(ahead, behind)
    if len(tasks) > FEW_TASKS * len(ahead.scores):
        return []
    one, other = without(ahead, tasks), without(behind, tasks)
    return [
        f"That rests on {', '.join(tasks)}: over the other {len(one.scores)} tasks {one.name} has "
        f"{one.exact_match:.1f}, {other.name} {other.exact_match:.1f} ({difference(one, other)})."
    ]


def _more_parameters(lines: Sequence[Line]) -> list[str]:
    """Is it the input that helps, or just more trained parameters?"""
    by_name = {line.name: line for line in lines}
    said = []
    for one, other in (("idpt_kv", "static_kv_matched"),
                       ("idpt_kv", "static_kv"), ("idpt_lowrank", "static_lowrank"),
                       ("idpt", "static"), ("idspam", "static")):  # fmt: skip
        if one in by_name and other in by_name:
            a, b = by_name[one], by_name[other]
            gap = difference(a, b)
            word = {1: "helps", 0: "makes no sure difference", -1: "hurts"}[gap.sure]
            said.append(
                f"Depending on the input {word}: {one} against {other} {gap} "
                f"({a.trained_parameters:,} and {b.trained_parameters:,} trained parameters)."
            )
    static, written = by_name.get("static_lowrank_matched"), by_name.get("idpt_kv")
    if static and written:
        gap = difference(static, written)
        said.append(
            f"As many parameters in a method that does not read the input: {static.name} against "
            f"{written.name} {gap}, {gap.word}."
        )
    return said


def _cheaper(frozen: Sequence[Line], first: Line | None) -> list[str]:
    """A much smaller method that is not surely worse than the best frozen one."""
    if first is None:
        return []
    small = [
        x
        for x in frozen
        if x.trained_parameters * 5 <= first.trained_parameters and difference(first, x).sure == 0
    ]
    chosen = best(small)
    if chosen is None:
        return []
    return [
        f"{first.name} is not surely better than {chosen.name}, of {chosen.trained_parameters:,} "
        f"trained parameters ({difference(first, chosen)}): take that where memory counts."
    ]


def _forgetting(tuned: Sequence[Line], base: float | None, digest_equal: bool) -> list[str]:
    said = []
    if digest_equal:
        said.append("The frozen LM is bit by bit what it was: its methods forget nothing.")
    for line in tuned:
        if base is None or line.perplexity is None:
            continue
        before = line.perplexity_before or base
        change = line.perplexity / before - 1
        if change > NOTICEABLE:
            said.append(
                f"{line.name} forgot: perplexity of other text {before:.2f} -> "
                f"{line.perplexity:.2f} "
                f"({change:+.0%})."
            )
    return said


def _score(line: Line) -> str:
    return f"{line.exact_match:.1f} [{line.ci95[0]:.1f}, {line.ci95[1]:.1f}]"

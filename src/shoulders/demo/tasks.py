"""The demo's mixture: small text tasks made from packages that know the answers.

Several tasks ask different things of the same items (nouns, numbers, countries), so the
instruction alone says which answer is wanted. Items are held out per pool, not per task: the
nouns of all test rows, say, are kept out of the train rows of every task about nouns.
"""

from __future__ import annotations

import calendar
import importlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from shoulders.data.rows import Row
from shoulders.demo.words import NOUNS, VERBS
from shoulders.errors import ShouldersError, install

T = TypeVar("T")

TRAIN_ROWS = 200
TEST_ROWS = 25


@dataclass(frozen=True)
class Task:
    """One task: what to ask about an item of a pool, and the right answers.

    `phrasings` hold one `{x}` each, for the item. `show` writes the item out for the
    instruction. `answer` returns the right answers, best first, or none for an item that the task
    cannot use. `group`, where given, maps the best answer to a class; rows are then drawn from all
    classes equally often.
    """

    name: str
    pool: str
    phrasings: tuple[str, ...]
    answer: Callable[[str], tuple[str, ...]]
    group: Callable[[str], str] | None = None
    show: Callable[[str], str] = str


def demo_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """Return (train, test): `TRAIN_ROWS` and `TEST_ROWS` rows of every task, fixed by `seed`.

    Train rows are shuffled over the tasks and never equal; an item may come back in another
    phrasing. Test rows stand task by task. No item of a test row occurs in a train row of any
    task. Raises `ShouldersError` when a package of the extra `demo` is missing.
    """
    tasks = demo_tasks()
    pools = {name: _shuffled(items, seed, name) for name, items in demo_pools().items()}
    drawn = {task.name: _draw(task, pools[task.pool], TEST_ROWS) for task in tasks}
    held: dict[str, set[str]] = {name: set() for name in pools}
    for task in tasks:
        held[task.pool].update(item for item, _ in drawn[task.name])
    train: list[Row] = []
    test: list[Row] = []
    for task in tasks:
        seen = [item for item in pools[task.pool] if item not in held[task.pool]]
        train += _rows(task, _draw(task, seen, TRAIN_ROWS), seed)
        test += _rows(task, drawn[task.name], seed)
    return _shuffled(train, seed, "train"), test


def demo_tasks() -> tuple[Task, ...]:
    """Return the tasks. Raises `ShouldersError` when a package they ask is missing."""
    inflect = _package("inflect").engine()
    num2words = _package("num2words").num2words
    codes = _country_codes()
    languages = _country_languages(codes)
    kinds = {noun: kind for kind, nouns in NOUNS.items() for noun in nouns.split()}

    def words(number: str) -> str:
        return str(num2words(int(number)))

    return (
        Task(
            "plural",
            "noun",
            ("What is the plural of {x}?", "Give the plural form: {x}", "One {x}, many what?"),
            lambda noun: (str(inflect.plural_noun(noun)),),
        ),
        Task(
            "article",
            "noun",
            ("Put a or an before {x}.", "Write {x} with its article.", "Is it a or an {x}?"),
            lambda noun: (str(inflect.a(noun)),),
            group=lambda phrase: phrase.split()[0],
        ),
        Task(
            "category",
            "noun",
            ("Category of the word {x}?", "Which category fits {x}?", "Classify the word {x}."),
            lambda noun: (kinds[noun],),
            group=lambda kind: kind,
        ),
        Task(
            "uppercase",
            "noun",
            ("Write {x} in capital letters.", "Put {x} in upper case.", "Capitalise all of {x}."),
            lambda noun: (noun.upper(),),
        ),
        Task(
            "first_letter",
            "noun",
            ("First letter of the word {x}?", "Which letter does {x} start with?"),
            lambda noun: (noun[0].upper(),),
        ),
        Task(
            "participle",
            "verb",
            ("What is the -ing form of {x}?", "Present participle of {x}?", "Add -ing to {x}."),
            lambda verb: (str(inflect.present_participle(verb)),),
        ),
        Task(
            "number_words",
            "number",
            ("Write {x} in words.", "Spell out the number {x}.", "How is {x} read aloud?"),
            lambda number: (words(number),),
        ),
        Task(
            "ordinal",
            "number",
            ("Ordinal of {x} in digits?", "Make {x} an ordinal.", "Position number {x}, in short?"),
            lambda number: (str(num2words(int(number), to="ordinal_num")),),
        ),
        Task(
            "number_digits",
            "number",
            ("Write {x} in digits.", "Give the number {x}.", "Which number is {x}?"),
            lambda number: (number,),
            show=words,
        ),
        Task(
            "country_code",
            "country",
            ("ISO code of {x}?", "Two-letter country code of {x}?", "Abbreviate the country {x}."),
            lambda country: (codes[country],),
        ),
        Task(
            "country_language",
            "country",
            ("Language of {x}?", "Official language of {x}?", "What is spoken in {x}?"),
            languages.__getitem__,
        ),
        Task(
            "month",
            "month",
            ("Month of {x}?", "Which month is {x}?", "Name the month of {x}."),
            lambda month: (calendar.month_name[int(month[-2:])],),
            group=lambda name: name,
        ),
    )


def demo_pools() -> dict[str, list[str]]:
    """Return the items by pool, each item once, as the text that stands in the instruction."""
    return {
        "noun": [noun for nouns in NOUNS.values() for noun in nouns.split()],
        "verb": VERBS.split(),
        "number": [str(number) for number in range(1, 500)],
        "country": list(_country_codes()),
        "month": [f"{year}-{month:02}" for year in range(1970, 2030) for month in range(1, 13)],
    }


def _country_codes() -> dict[str, str]:
    """Map English country names of at most two words to their ISO 3166 two-letter codes."""
    names = _package("babel").Locale("en").territories
    codes = (str(country.alpha_2) for country in _package("pycountry").countries)
    return {
        names[code]: code
        for code in codes
        if code in names and len(names[code].split()) <= 2 and not set(".()") & set(names[code])
    }


def _country_languages(codes: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Map countries to the English names of their official languages, most spoken first."""
    official = _package("babel.languages").get_official_languages
    names = _package("babel").Locale("en").languages
    languages = {}
    for country, code in codes.items():
        found = (tag.split("_")[0] for tag in official(code, de_facto=True))
        languages[country] = tuple(dict.fromkeys(names[tag] for tag in found if tag in names))
    return languages


def _draw(task: Task, items: list[str], count: int) -> list[tuple[str, int]]:
    """Return `count` pairs (item, round): the classes in turn, round n when used n times before."""
    groups: dict[str, list[str]] = {}
    for item in items:
        answers = task.answer(item)
        if answers:
            groups.setdefault(task.group(answers[0]) if task.group else "", []).append(item)
    classes = [groups[name] for name in sorted(groups)]
    turns = ((classes[turn % len(classes)], turn // len(classes)) for turn in range(count))
    return [(group[place % len(group)], place // len(group)) for group, place in turns]


def _rows(task: Task, drawn: Iterable[tuple[str, int]], seed: int) -> list[Row]:
    """Write out drawn items: each item starts at a random phrasing, every round takes the next."""
    rows = []
    for item, round_ in drawn:
        start = random.Random(f"{seed} {task.name} {item}").randrange(len(task.phrasings))
        phrasing = task.phrasings[(start + round_) % len(task.phrasings)]
        rows.append(Row(task.name, phrasing.format(x=task.show(item)), task.answer(item)))
    return rows


def _shuffled(items: Iterable[T], seed: int, name: str) -> list[T]:
    shuffled = list(items)
    random.Random(f"{seed} {name}").shuffle(shuffled)
    return shuffled


def _package(name: str) -> Any:
    """Import a package of the extra `demo`, or say how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ShouldersError(
            f"the demo needs the package {name.split('.')[0]}: {install('demo')}"
        ) from error

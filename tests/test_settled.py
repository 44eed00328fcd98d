"""Training leaves what was there before it out of the search for garbage; it is freed as ever."""

from __future__ import annotations

import gc
import weakref

from shoulders.training.memory import settled


class Thing:
    """Something that can refer to itself."""

    itself: Thing


def test_what_is_there_is_left_out_until_the_end() -> None:
    kept = [Thing() for _ in range(10)]
    with settled():
        assert gc.get_freeze_count() >= len(kept)
        assert not any(found is kept[0] for found in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(found is kept[0] for found in gc.get_objects())


def test_cycles_made_meanwhile_are_found() -> None:
    with settled():
        made = Thing()
        made.itself = made
        gone = weakref.ref(made)
        del made
        gc.collect()
        assert gone() is None

"""What the services remember for clients, and that it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvtier.control.api import idempotency, listings
from kvtier.control.api.errors import ApiError
from kvtier.control.api.idempotency import RepeatableCalls
from kvtier.control.api.listings import Listings
from kvtier.control.api.page_tokens import BadPageTokenError, PageTokens
from kvtier.control.event_hub import EventHub, HubClosedError, Interest
from tests.unit.control.control_host import program


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


# -- lists -------------------------------------------------------------------------------------------


def keys(count: int) -> list[tuple[str, Any]]:
    return [("engine-0", program(str(n))) for n in range(count)]


def test_lists_are_kept_for_a_while_and_within_their_limits() -> None:
    clock = Clock()
    kept = Listings(clock, max_lists=3, max_keys=100)
    ids = [kept.keep(keys(10)) for _ in range(3)]
    assert kept.get(ids[0]) == keys(10)
    # The one that was asked for longest ago makes room.
    ids.append(kept.keep(keys(10)))
    assert [kept.get(list_id) is not None for list_id in ids] == [True, False, True, True]
    big = kept.keep(keys(99))
    assert [kept.get(list_id) is not None for list_id in [*ids, big]] == [False] * 4 + [True]
    # One that is too big alone is kept nevertheless: its reader must get on.
    bigger = kept.keep(keys(101))
    assert (kept.get(big), kept.get(bigger)) == (None, keys(101))
    clock.now_s = listings.KEPT_S + 1
    assert kept.get(bigger) is None
    last = kept.keep(keys(1))
    clock.now_s *= 3
    kept.forget_old()
    assert kept.get(last) is None
    assert kept._key_count == 0


def test_a_page_token_is_good_for_its_server_and_its_list_alone() -> None:
    tokens = PageTokens()
    token = tokens.make(["a"], [b"id", 7])
    assert tokens.read(token, ["a"]) == [b"id", 7]
    for other, filters in ((tokens, ["b"]), (PageTokens(), ["a"])):
        with pytest.raises(BadPageTokenError):
            other.read(token, filters)
    for bad in ("", "é", "====", token[1:], token + "A"):
        with pytest.raises(BadPageTokenError):
            tokens.read(bad, ["a"])


# -- repeated calls ----------------------------------------------------------------------------------


def test_a_caller_that_goes_away_leaves_the_answer_for_its_repetition() -> None:
    async def scene() -> None:
        calls = RepeatableCalls[str](Clock())
        begun, end = asyncio.Event(), asyncio.Event()
        times = 0

        async def do() -> str:
            nonlocal times
            times += 1
            begun.set()
            await end.wait()
            return "done"

        first = asyncio.create_task(calls.run(("m", "id"), b"x", do))
        await begun.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        end.set()
        assert await calls.run(("m", "id"), b"x", do) == "done"
        assert times == 1
        with pytest.raises(ApiError):
            await calls.run(("m", "id"), b"y", do)

    asyncio.run(scene())


def test_answers_are_forgotten_after_a_while_or_when_there_are_too_many() -> None:
    async def scene() -> None:
        clock = Clock()
        calls = RepeatableCalls[int](clock, max_calls=2)
        times = 0

        async def do() -> int:
            nonlocal times
            times += 1
            return times

        assert [await calls.run((key,), b"", do) for key in "abcb"] == [1, 2, 3, 2]
        assert len(calls) == 2
        assert await calls.run(("a",), b"", do) == 4
        clock.now_s = idempotency.KEPT_S + 1
        assert await calls.run(("a",), b"other content", do) == 5
        assert len(calls) == 1

    asyncio.run(scene())


# -- watchers ----------------------------------------------------------------------------------------


def test_a_slow_reader_gets_the_newest_events_after_the_number_of_lost_ones() -> None:
    async def scene() -> None:
        lost: list[int] = []
        hub = EventHub[str](lost.append, capacity=3)
        with hub.watching(Interest()) as watcher:
            events = watcher.read()
            for n in range(5):
                hub.publish("kind", None, lambda n=n: f"e{n}")  # type: ignore[misc]
            assert len(watcher) == 3
            assert [await anext(events) for _ in range(4)] == [2, "e2", "e3", "e4"]
            hub.lose(7)
            hub.publish("kind", None, lambda: "e5")
            assert [await anext(events) for _ in range(2)] == [7, "e5"]
            hub.close()
            with pytest.raises(HubClosedError):
                await anext(events)
        assert lost == [1, 1]

    asyncio.run(scene())


def test_an_event_that_nobody_wants_is_not_even_made() -> None:
    async def scene() -> None:
        hub = EventHub[str](lambda _: None)
        made: list[str] = []

        def make() -> str:
            made.append("made")
            return "event"

        hub.publish("staged", program(), make)
        with (
            hub.watching(Interest(kinds=frozenset(["loaded"]))),
            hub.watching(Interest(name="other")),
            hub.watching(Interest(tenant="acme", by_tenant=True)),
        ):
            hub.publish("staged", program(), make)
            assert made == []
            with hub.watching(Interest()), hub.watching(Interest(name="agent")):
                hub.publish("staged", program(), make)
        assert made == ["made"]

    asyncio.run(scene())

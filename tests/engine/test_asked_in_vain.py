"""What the connector says of a request that was deferred before: only while kvtier works, and only until it is asked anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.connector import KVTierConnector
from kvtier.turns.block_pool import spare_lookups

pytestmark = pytest.mark.engine

REQUEST = SimpleNamespace(request_id="r")


class Half:
    """A scheduler half whose deferral of everybody stands while `deferred` says so."""

    def __init__(self) -> None:
        self.deferred = True
        self.deferrals = SimpleNamespace(stands=lambda _: self.deferred)

    def match(self, _request: Any, _local_tokens: int) -> int | None:
        return None if self.deferred else 0


@pytest.fixture
def connector() -> KVTierConnector:
    made: Any = object.__new__(KVTierConnector)
    made.scheduler_half, made._deferred_id, made._local_tokens = Half(), None, 0
    return made


def test_nobody_is_deferred_any_more_when_kvtier_has_given_up(connector: KVTierConnector) -> None:
    manager = SimpleNamespace(
        empty_kv_cache_blocks="none", get_computed_blocks=lambda _: ("blocks", 0, 0)
    )
    spare_lookups(manager, connector)
    for _ in range(2):
        manager.get_computed_blocks(REQUEST)
        assert connector.get_num_new_matched_tokens(REQUEST, 0) == (None, False)
    connector.scheduler_half = None
    manager.get_computed_blocks(REQUEST)
    assert connector.get_num_new_matched_tokens(REQUEST, 0) == (0, False)


def test_beside_another_connector_a_request_is_asked_about_each_time(
    connector: KVTierConnector,
) -> None:
    """Lookups are not left out there, and nobody says that the next question is coming."""
    for _ in range(2):
        assert connector.get_num_new_matched_tokens(REQUEST, 0) == (None, False)
    half: Any = connector.scheduler_half
    half.deferred = False
    assert connector.get_num_new_matched_tokens(REQUEST, 0) == (0, False)

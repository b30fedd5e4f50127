"""What each method of the control API is called by, for tests of both clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtier.client import KVTierClient, TtlScope

if TYPE_CHECKING:
    from collections.abc import Callable

# By method: the call, and whether it may be sent again.
CALLS: dict[str, tuple[Callable[[KVTierClient], Any], bool]] = {
    "ListPrograms": (lambda c: c.list_programs(), True),
    "GetProgram": (lambda c: c.get_program("p"), True),
    "PinProgram": (lambda c: c.pin_program("p", 3), True),
    "ReleaseProgram": (lambda c: c.release_program("p"), False),
    "StageProgram": (lambda c: c.stage_program("p"), False),
    "PrefetchProgram": (lambda c: c.prefetch_program("p"), False),
    "AnnounceToolCall": (lambda c: c.announce_tool_call("p", "bash"), True),
    "AnnounceToolReturn": (lambda c: c.announce_tool_return("p"), True),
    "EndProgram": (lambda c: c.end_program("p"), False),
    "SetTtlOverride": (lambda c: c.set_ttl_override(TtlScope.of_all(), 1), True),
    "ListTtlOverrides": (lambda c: c.list_ttl_overrides(), True),
    "DeleteTtlOverride": (lambda c: c.delete_ttl_override(TtlScope.of_all()), False),
    "GetPolicy": (lambda c: c.get_policy(), True),
    "UpdatePolicy": (lambda c: c.update_policy(stage=False), True),
    "GetStatus": (lambda c: c.get_status(), True),
    "ExplainDecision": (lambda c: c.explain_decision("p"), True),
    "WatchEvents": (lambda c: next(c.watch()), False),
    "Calibrate": (lambda c: c.calibrate(), False),
}

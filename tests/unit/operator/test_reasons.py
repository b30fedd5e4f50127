"""Every reason that an engine may give is explained in words."""

from __future__ import annotations

from kvtier.client import Decision, OptionCost
from kvtier.control.registry import NATURAL_ENDS
from kvtier.gpu_pin import ReleaseCause
from kvtier.operator.reasons import (
    ACTIONS,
    REASONS,
    RELEASES,
    chosen_option,
    headline,
    in_words,
)
from kvtier.policy import RETURN_REASONS
from kvtier.ttl.holding import HoldReason


def decision(event: str, action: str, **costs: float) -> Decision:
    options = tuple(OptionCost(option, cost_s, {}) for option, cost_s in costs.items())
    return Decision("e0", "r", None, event, action, "no_hit", None, options, {})


def test_every_reason_of_a_decision_has_words() -> None:
    known = {str(reason) for reason in HoldReason} | RETURN_REASONS
    assert known <= set(REASONS)
    assert {str(cause) for cause in ReleaseCause} - NATURAL_ENDS == set(RELEASES)
    assert in_words("ttl", "release") != in_words("ttl", "prefetch")
    assert in_words("of_a_newer_engine") == "of a newer engine"


def test_every_action_has_words() -> None:
    assert {action for event, action in ACTIONS if event == "pause"} == {"pin", "offload", "drop"}
    assert headline(decision("return", "reload")) == "return: loaded from the CPU tier"
    assert headline(decision("return", "guess")) == "return: guess"
    assert headline(decision("prefetch", "end")) == "prefetch: has ended"


def test_the_option_taken_is_the_cheapest_that_does_what_was_done() -> None:
    pinned = decision("pause", "pin", drop=0.1, pin=2.0, pin_and_stage=1.0)
    assert chosen_option(pinned) == "pin_and_stage"
    assert chosen_option(decision("return", "reload", recompute=1.0, reload=0.5)) == "reload"
    assert chosen_option(decision("pause", "drop")) is None

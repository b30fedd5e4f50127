"""Decisions in words: what was chosen and why, by the machine-readable names that engines give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtier.operator.durations import about

if TYPE_CHECKING:
    from kvtier.client import Decision

ACTIONS: Final = {
    ("pause", "pin"): "kept in GPU memory",
    ("pause", "offload"): "given up in GPU memory, kept in the CPU tier",
    ("pause", "drop"): "given up",
    ("return", "gpu"): "taken from GPU memory",
    ("return", "reload"): "loaded from the CPU tier",
    ("return", "recompute"): "computed anew",
    ("prefetch", "accepted"): "begun, or not needed",
    ("prefetch", "clipped"): "a part only",
    ("prefetch", "rejected"): "refused",
    ("prefetch", "missing"): "nothing to load",
    ("prefetch", "end"): "has ended",
    ("release", "release"): "no longer kept in GPU memory",
}

RELEASES: Final = {
    "ttl": "Its TTL was over.",
    "pressure": "A request needed the memory.",
    "reset": "vLLM's prefix cache was reset.",
    "ended": "The program was over.",
    "off": "kvtier was switched off.",
    "budget": "Other pins were worth more of the budget of all pins.",
    "command": "Somebody asked for it: kvtier programs release, or ReleaseProgram.",
    "shutdown": "The engine ended.",
}
"""Causes of a pin's end: `kvtier.gpu_pin.ReleaseCause`, but for those that another decision tells of."""

REASONS: Final = {
    # Of a pause: `kvtier.ttl.holding.HoldReason`.
    "memory_free": "The pin takes blocks that nobody misses: the longest TTL.",
    "return_expected": "Until this TTL, the chance of a return is worth more than the memory.",
    "memory_scarce": "At every TTL, the memory is worth more than the chance of a return.",
    "miss_is_free": "A miss would cost nothing, so holding saves nothing.",
    "override_fixed": "An operator, a setting or the client set this TTL.",
    "override_cap": "An operator's cap shortened the TTL.",
    "override_floor": "An operator's floor lengthened the TTL.",
    "max_ttl": "No pin lasts longer than max_ttl_s.",
    "tenant_budget": "The tenant's budget of pinned memory shortened the TTL, possibly to 0.",
    "pin_budget": "Too few blocks are left in the budget of all pins.",
    "nothing_reusable": "No full block can hit again.",
    "cheaper_unpinned": "A TTL exists, but all costs counted, not pinning is cheaper.",
    # Of a return: `kvtier.costs.return_decision.ReturnReason`, and what `kvtier.policy` adds.
    "empty_prompt": "There was nothing to compute.",
    "no_hit": "Neither GPU memory nor the CPU tier held a part of the prompt.",
    "gpu_hit": "The CPU tier held nothing beyond what GPU memory held.",
    "reload_cheaper": "Loading all that the CPU tier held was cheaper than computing it.",
    "partial_reload_cheaper": "Loading a part of what the CPU tier held, and computing the rest, was cheapest.",
    "recompute_cheaper": "Computing was cheaper than loading, even on an idle link.",
    "link_busy": "Computing was cheaper because of the transfers queued on the link.",
    "link_probe": "Loading seemed too slow for many returns: one is tried, to measure the link anew.",
    "configured": "The setting reload says so.",
    # Of a prefetch: `kvtier.turns.prefetching.plan` and `kvtier.turns.prefetch`.
    "loading": "It is being loaded from the CPU tier.",
    "in_gpu": "All of it is in GPU memory already.",
    "under_way": "It was being loaded already.",
    "memory": "Nobody can spare more GPU memory.",
    "budget": "Pins may not hold more.",
    "ttl": "It must not be pinned: by an override, a setting or the tenant's budget.",
    "no_kv": "No KV of it is kept.",
    "no_tier": "The CPU tier is away.",
    "mode": "kvtier is not on.",
    "running": "A turn of the program was under way.",
    "busy": "Too many prefetches, or an earlier one of it, were under way.",
    "fixed_ttl": "The setting fixed_ttl_s says how long.",
    "loaded": "All of it was loaded.",
    "returned": "The program came back meanwhile.",
    "released": "The program's KV was released meanwhile.",
    "ended": "The program ended meanwhile.",
    "pin_ended": "Its pin ended meanwhile.",
    "lookup_late": "The CPU tier did not answer in time.",
    "copy_failed": "A copy failed.",
    "reset": "vLLM's prefix cache was reset meanwhile.",
    "shutdown": "kvtier ended in this engine.",
}


def in_words(reason: str, event: str = "") -> str:
    """Return why, in a sentence; a newer engine's reason as it is."""
    words = RELEASES if event == "release" else REASONS
    return words.get(reason, reason.replace("_", " "))


def headline(decision: Decision) -> str:
    """Return what was decided, in a few words."""
    done = ACTIONS.get((decision.event, decision.action), decision.action)
    ttl = f" for {about(decision.ttl_s)}" if decision.ttl_s else ""
    return f"{decision.event}: {done}{ttl}"


def chosen_option(decision: Decision) -> str | None:
    """Return which of the options with a cost was taken: the cheapest that does what was done.

    A pin may come with a copy or without, a reload may take all or a part.
    """
    taken = [cost for cost in decision.costs if cost.option.split("_")[0] == decision.action]
    return min(taken, key=lambda cost: cost.cost_s).option if taken else None

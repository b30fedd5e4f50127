"""The methods of kvtier's connector that vLLM's scheduler calls: all that kvtier does on its thread.

Besides them there is `make_room`, which its allocation calls where there is no free block. `defers` is asked by its
prefix cache lookup.
"""

from typing import Final

HOOKS: Final = (
    "on_new_request",
    "defers",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "request_finished_all_groups",
    "build_connector_meta",
    "update_connector_output",
    "has_pending_push_work",
    "get_kv_connector_stats",
)

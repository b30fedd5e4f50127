"""The policies that kvtier is measured against, each after its paper or public code.

All of them run on vLLM's own scheduler and block pool, over the same CPU tier (`connector`). A module per
policy tells its rule, where it comes from, and where it had to depart from it.
"""

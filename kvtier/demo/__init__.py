"""``kvtier demo``: one multi-agent workload on plain vLLM, stock LMCache and kvtier."""

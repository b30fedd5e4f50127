"""A turn from its arrival to its end, inside vLLM's scheduler: what `scheduler_half` is composed of."""

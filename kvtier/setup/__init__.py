"""`make setup`: the small model, and vLLM's packaging on CPU."""

"""`kvtier serve`: the plan, the environment of engines, and the processes."""

"""Which tool a turn has called, told from the tail of its output."""

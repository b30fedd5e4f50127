"""The LMCache server of a host: its files, start and guardian, and what it keeps when memory is short."""

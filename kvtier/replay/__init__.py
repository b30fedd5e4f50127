"""Replay: what a policy would do for recorded agents on given hardware, in virtual time."""

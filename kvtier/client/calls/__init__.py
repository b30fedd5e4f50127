"""Every call of the control API: what is sent, and how its answer is read.

Both clients send these. Whether a call may be repeated is said here too: repeated is only what leads to the
same state *and* the same answer when it is done twice. A second `ReleaseProgram` would be answered
"missing" for what the first one did.
"""

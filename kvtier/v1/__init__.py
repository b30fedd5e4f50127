"""Messages and stubs of the control API, generated from `proto/kvtier/v1` (make protos)."""

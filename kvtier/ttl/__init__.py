"""What `ttl_controller` is made of: how long tools take, who comes back at all, what holding memory costs, the operator's overrides."""

"""What `cost_model` is made of: measured estimates of time, and the choice at a return."""

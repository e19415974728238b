"""What may be cut along the token axis, and how: one rule for each op."""

"""The token-axis rules: which ops can be cut along the token axis, and how."""

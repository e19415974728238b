"""Autotuning: measures on this machine whether a graph is woven, from how many tokens on, and how. It runs before compilation."""

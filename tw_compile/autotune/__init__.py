"""What is measured on this machine before a graph is compiled: whether, from how many tokens on and how it is woven."""

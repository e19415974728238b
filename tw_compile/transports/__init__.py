"""How the ranks of a group exchange data, and how they agree on a transport."""

"""Labels: a small model writes, a large one scores its candidates."""

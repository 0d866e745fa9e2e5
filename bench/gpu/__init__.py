"""`make gpu`: builds, tests and measures on a GPU within ten minutes, and writes one file about it."""

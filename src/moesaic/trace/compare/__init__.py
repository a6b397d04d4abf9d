"""Two records of the same tokens: where they differ, and what explains it."""

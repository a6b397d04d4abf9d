"""Watching a model run: who is asked, what was said, and how it becomes one Trace. Nothing here changes a model."""

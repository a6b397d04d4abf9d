"""Watching routing: record, store, steps, statistics, figures. Nothing here changes a model."""

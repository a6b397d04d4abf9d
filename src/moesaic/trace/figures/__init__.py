"""Figures of a recorded routing."""

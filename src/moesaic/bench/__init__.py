"""Measuring engines and their peers side by side: same weights, same routing, correctness first, rounds in turn."""

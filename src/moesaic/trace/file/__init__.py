"""Trace files, format 1: written, and read as the untrusted input they are."""

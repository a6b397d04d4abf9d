"""The recorded rule applied again: every stage derived from logits and checked against what was recorded."""

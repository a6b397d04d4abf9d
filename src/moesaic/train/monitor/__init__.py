"""A training run watched: what each expert got, step by step, in a log that survives a kill, with alerts."""

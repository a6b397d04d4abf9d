"""Training runs side by side: read, put in numbers with their spread, drawn."""

"""Hugging Face models: their MoE layers, loading, weights in and out. transformers is imported only where it is used."""

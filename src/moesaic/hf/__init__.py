"""Hugging Face models: their MoE layers, loading, weights in and out. transformers is imported where it is used."""

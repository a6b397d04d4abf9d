"""Data, the training run of the shipped model, and callbacks for the Hugging Face Trainer."""

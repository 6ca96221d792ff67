"""Hugging Face checkpoints: mapping tables, a lazy reader, a streaming writer."""

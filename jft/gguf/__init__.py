"""GGUF files, as llama.cpp writes them: a model's metadata, quantised tensors, tokenizer and chat template in one file."""

from jft.gguf.file import File, GgufError, is_gguf, read

__all__ = ["File", "GgufError", "is_gguf", "read"]

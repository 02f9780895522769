"""GGUF files as sources of models."""

from moe_hf.gguf_files.file import GGUFFile, gguf_config, gguf_file_of, read_gguf, reading_errors


__all__ = ["GGUFFile", "gguf_config", "gguf_file_of", "read_gguf", "reading_errors"]

"""File formats: data files, checkpoints of this project and of others, tokenizers."""

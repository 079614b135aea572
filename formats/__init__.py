"""What lies on a disk: data files, checkpoints, foreign checkpoints, tokenizers."""

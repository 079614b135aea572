"""What the training loop is made of: losses, packed batches, long runs."""

"""Text to token ids and back: byte-level BPE and sentencepiece behind one interface, and their sources."""

"""What the decoding loop is made of: settings, thresholds, prediction, the record of a run, display."""

"""What is run now and then: bench, preparing data."""

"""What one training step is, for each kind of dictionary."""

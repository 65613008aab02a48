"""What experiments of every kind share."""

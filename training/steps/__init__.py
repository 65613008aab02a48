"""What one training step is, for each kind of dictionary.

May import data and below, and saepatch.
"""

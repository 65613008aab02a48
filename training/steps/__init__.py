"""Training steps of each kind of dictionary.

May import data and below, and saepatch.
"""

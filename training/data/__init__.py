"""Texts, rows of tokens, and the stream of activations.

May import ranks and below, and saepatch.
"""

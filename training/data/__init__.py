"""Texts, rows of tokens, and activations as they stream by.

May import ranks and below, and saepatch.
"""

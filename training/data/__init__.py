"""Texts, rows of tokens, and activations as they stream by."""

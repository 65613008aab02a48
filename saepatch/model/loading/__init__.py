"""Loading a model: its blocks and sites found, checked and probed.

May import the rest of model, and below.
"""

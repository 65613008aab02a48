"""Facts in the weights: where a model recalls them, edits of MLP weights that change them, and how the edits fail.

May import steering and below.
"""

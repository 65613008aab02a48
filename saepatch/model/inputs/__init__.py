"""What goes into a model: padded batches of tokens, and what padding does to results.

May import errors alone.
"""

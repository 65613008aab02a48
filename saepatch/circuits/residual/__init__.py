"""What each part of the residual stream adds to a logit directly, and what later parts make up for.

May import the rooms below circuits.
"""

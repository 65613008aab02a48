"""Experiment tracking: the local log always, optionally W&B and trackio.

May import report and below.
"""

"""Where a run writes its numbers: the local log always, W&B and trackio beside it.

May import report and below.
"""

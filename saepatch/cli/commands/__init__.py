"""One file per command: a function from settings to a result. Heavy imports happen when a command runs.

May import demo and below.
"""

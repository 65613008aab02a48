"""The command line: parses settings, runs commands, prints their results.

May import demo and below.
"""

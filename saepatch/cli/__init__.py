"""The command line: what `saepatch` parses, runs and prints.

May import demo and below.
"""

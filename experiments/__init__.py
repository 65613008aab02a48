"""Experiments: one question a file, each a command that leaves rows, a summary and a page.

May import saepatch, and of training only the benchmarks its steps.
"""

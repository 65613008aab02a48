"""Experiments: each is a command that answers one question and writes rows, a summary and a report.

They may import saepatch. Only the benchmarks may import training, whose steps they time.
"""

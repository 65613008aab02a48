"""Commands that read finished runs, trained dictionaries among them.

May import every room below cli.
"""

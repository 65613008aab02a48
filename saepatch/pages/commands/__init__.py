"""The pages of single commands.

May import pages.overview and what it builds on, and the rooms below pages.
"""

"""Settings of the commands that read finished runs, trained dictionaries among them.

May import settings.mixins and below.
"""

"""Settings of the commands that read finished runs.

May import settings.mixins and below.
"""

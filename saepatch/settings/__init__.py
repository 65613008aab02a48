"""Settings of the commands, as frozen dataclasses. Light: no torch.

May import errors, records.
"""

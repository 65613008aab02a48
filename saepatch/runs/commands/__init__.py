"""What the run of each command does: one part of it, and the results of all parts.

May import the driver, the files and the settings of runs, and the rooms below runs.
"""

"""The engine of exact sweeps and gradients: kept runs, shortcuts, components, corruptions, metrics.

May import splicing and below.
"""

from saepatch.engine import metrics as metrics  # `saepatch.metrics`: a public name has to be an attribute of its room

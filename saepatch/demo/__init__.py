"""`saepatch demo`: patching, restoration and steering on the embedded model, end to end.

May import pages and below.
"""

from saepatch.demo.run import run_demo

__all__ = ["run_demo"]

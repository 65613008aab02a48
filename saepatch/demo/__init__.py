"""The main job, end to end: what `saepatch demo` runs on the embedded model.

May import pages and below.
"""

from saepatch.demo.run import run_demo

__all__ = ["run_demo"]

"""Pages about runs, made from the files in a run's folder alone: `report.html`, and comparisons of two runs.

May import runs and below.
"""

from saepatch.pages.compare import compare_page
from saepatch.pages.run import run_page, write_report
from saepatch.pages.tracked import track_page, track_run

__all__ = ["compare_page", "run_page", "track_page", "track_run", "write_report"]

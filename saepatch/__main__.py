"""`python -m saepatch`, and what the `saepatch` command starts."""

import sys

from saepatch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m training.organism`."""

import sys

from jsonargparse import auto_cli

from saepatch.errors import UserError

from .maker import OrganismConfig, main

try:
    sys.exit(main(auto_cli(OrganismConfig, as_positional=False)))
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

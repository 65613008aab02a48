"""`python -m saepatch`, and what the `saepatch` command starts."""

import signal
import sys


def main() -> int:
    """Run the command line; returns the exit code. Interrupts while its modules are loaded end it as later ones do."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from saepatch.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # nothing has begun, and Python's end is not to be traced
            signal.signal(number, signal.SIG_IGN)
        sys.stderr.write("interrupted: written files are complete\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())

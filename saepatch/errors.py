"""The one error for bad input."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the value and a remedy. The command line prints it and exits with code 2.
    """

"""The one error for bad input, and how another error is quoted in it."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the value and a remedy. The command line prints it and exits with code 2.
    """


def reason_of(error: BaseException) -> str:
    """The first line of an error, with its class where the text is no sentence: `KeyError: 'batchtopk'`."""
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    if not lines:
        return kind
    return lines[0] if isinstance(error, OSError | ValueError | RuntimeError) else f"{kind}: {lines[0]}"

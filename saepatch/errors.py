"""The single error class for bad input, and how other errors are quoted in its message."""


class UserError(ValueError):
    """The user's input cannot be used.

    The message is one line that names the value and a remedy. The command line prints it and exits with code 2.
    """


def reason_of(error: BaseException) -> str:
    """First line of an error; with its class where the text alone explains nothing, as in `KeyError: 'batchtopk'`.

    All lines where the first ends with a colon, as those of torch's `load_state_dict` do.
    """
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    if not lines:
        return kind
    text = " ".join(" ".join(lines).split()) if lines[0].rstrip().endswith(":") else lines[0]
    return text if isinstance(error, OSError | ValueError | RuntimeError | ImportError) else f"{kind}: {text}"

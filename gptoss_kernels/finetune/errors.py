"""The error for whatever is wrong before training starts."""


class SetupError(Exception):
    """Something about the run that its user can put right; the message says what. Shown without a traceback."""

"""The errors that end a command with an exit code of their own."""


class InputError(Exception):
    """What the user gave is wrong. The message says what, where, what is allowed and what to do."""

    exit_code = 2


class DivergedError(Exception):
    """The loss or the gradient is no longer finite; the last checkpoint is from before it."""

    exit_code = 3


class PreemptedError(Exception):
    """A signal asked the run to stop, and a checkpoint of the last finished step is on disk."""

    exit_code = 75

"""The error that the command line shows as one sentence, without a traceback."""


class TrainerError(Exception):
    """Something the user can put right: the message names it, what was given and what is accepted."""


class FirstFailed(TrainerError):
    """What the first of several processes could not do; it tells the reason itself."""

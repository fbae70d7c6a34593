"""The exceptions a user is meant to read, and what a foreign one has to say."""


class VugenError(Exception):
    """A problem the user can act on.

    The message is one line that says what is wrong, where, and what to do. `app.main` prints it without a
    traceback (unless `--debug`) and exits with status 1.
    """


class TooFewImages(VugenError):
    """A set is too small for one metric; others may still be taken."""


class Stopped(Exception):
    """A signal asked a run to stop; its state has been saved and the message says how to go on."""


def first_line(error: BaseException) -> str:
    """What a foreign exception says, on one line of at most 300 characters; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

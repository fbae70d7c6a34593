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
    """What a foreign exception says, on one line of at most 300 characters; its kind if it says nothing.

    Of a pydantic `ValidationError`, its first problem: where it is and what is wrong there.
    """
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        return (f"{where}: {said}" if where else said)[:300]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

"""The one exception a user is meant to read."""


class VugenError(Exception):
    """A problem the user can act on.

    The message is one line that says what is wrong, where, and what to do. `app.main` prints it without a
    traceback (unless `--debug`) and exits with status 1.
    """

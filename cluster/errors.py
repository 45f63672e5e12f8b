"""What can go wrong, and whose turn it is then.

    UnclipError
    ├── UserError        the request was wrong: one line on stderr, exit code 2, nothing was done
    │   └── ArtifactNotFound
    └── WorkFailed       the work failed or found something wrong: exit code 1

Anything else that escapes is a defect of ours and keeps its traceback.
"""


class UnclipError(Exception):
    """Base of every error that is meant to be read by a person."""

    exit_code = 1


class UserError(UnclipError):
    """The request was wrong. The message names the thing, the value and the remedy."""

    exit_code = 2


class ArtifactNotFound(UserError):
    """No published artifact where one was asked for."""


class WorkFailed(UnclipError):
    """The work failed, or a check found something wrong."""

"""The error that a user sees: one sentence, and how it is printed."""

from __future__ import annotations


class LETError(ValueError):
    """A request that cannot be carried out; the message is one sentence for the user.

    Attributes:
        collective: every rank raises it, so that one of them suffices to print it.
    """

    def __init__(self, message: str, collective: bool = False) -> None:
        super().__init__(message)
        self.collective = collective


def first_line(error: BaseException) -> str:
    """First line of another package's message, to be quoted in one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

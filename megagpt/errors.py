"""The errors that a user is meant to read, and the suggestion for a word that was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal


class UserError(Exception):
    """Something the user can fix: printed in full, without a traceback, with exit status 2.

    `rule` names the setting, its value and the rule that it breaks; `remedy` says what to do instead.
    """

    exit_status = 2

    def __init__(self, rule: str, remedy: str = "") -> None:
        self.rule = rule
        self.remedy = remedy
        super().__init__(rule if not remedy else f"{rule}\n  {remedy}")


class RunFailure(UserError):
    """A run cannot go on, and not because of a setting: printed as a UserError is, with exit status 1.

    `cause` is one of megagpt.outcome's; `rank` is the one at fault, where one is known.
    """

    exit_status = 1

    def __init__(
        self, rule: str, remedy: str = "", *, cause: Literal["diverged", "corruption"], rank: int | None = None
    ) -> None:
        super().__init__(rule, remedy)
        self.cause: Literal["diverged", "corruption"] = cause
        self.rank = rank


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The suggestion of the known word nearest to `word`, to end a sentence with; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""

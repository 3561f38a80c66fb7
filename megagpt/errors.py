"""The one error that a user is meant to read, and the suggestion for a word that was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can fix: printed in full, without a traceback, with exit status 2.

    `rule` names the setting, its value and the rule that it breaks; `remedy` says what to do instead.
    """

    def __init__(self, rule: str, remedy: str = "") -> None:
        self.rule = rule
        self.remedy = remedy
        super().__init__(rule if not remedy else f"{rule}\n  {remedy}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The suggestion of the known word nearest to `word`, to end a sentence with; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""

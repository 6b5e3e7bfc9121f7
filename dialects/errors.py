"""Errors for people: what was wrong, the rule, what came, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class MxloomError(Exception):
    """A run that cannot go on. Its text stands alone; the command line prints it and exits with `exit_status`."""

    exit_status = 1


class UsageError(MxloomError):
    """What the user asked for makes no sense: an unknown name, a recipe key, a rule without effect."""

    exit_status = 2


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """` (did you mean "x"?)` for the nearest of `choices`, whatever the case of its letters; or nothing."""
    spelled = {choice.lower(): choice for choice in choices}
    near = get_close_matches(word.lower(), spelled, n=1, cutoff=0.5)
    return f' (did you mean "{spelled[near[0]]}"?)' if near else ""


def shortened(text: str, limit: int = 80) -> str:
    """The text, its middle left out where it has more than `limit` characters."""
    head = limit * 2 // 3
    return text if len(text) <= limit else f"{text[:head]}...{text[head + 3 - limit :]}"


def first_line(error: BaseException, limit: int = 300) -> str:
    """Kind of error and the first line of its text that is not empty, cut after `limit` characters."""
    kind = type(error).__name__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{kind}: {line[:limit]}" if line else kind

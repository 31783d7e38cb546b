"""The error that a program answers with one sentence, and how others are put into one."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting that cannot work. The message is one sentence: which setting, which value, what to do."""


def describe_error(error: BaseException) -> str:
    """The first line of a library's error, to stand in brackets in a sentence; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def check_positive(name: str, value: float | None) -> None:
    """Raise SettingError for a setting that is given and not above zero."""
    if value is not None and not value > 0:
        raise SettingError(f"The setting {name} is {value}; it must be above zero.")

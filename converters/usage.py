"""click's complaints in this program's words: one message, one hint, the word that was probably meant."""

from __future__ import annotations

import re

import click

from qformats.errors import UsageError, did_you_mean

__all__ = ["said"]

_CHOICE = re.compile(r"'([^']*)' is not one of ")


def said(error: click.ClickException) -> UsageError:
    """The usage error that says what click found."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    see = f"see {context.command_path} --help" if context is not None else "see qconvert --help"
    if isinstance(error, click.NoSuchOption):
        known = [] if context is None else [word for param in context.command.get_params(context) for word in _shown(param)]
        return UsageError("usage", f"there is no option {error.option_name!r}", hint=did_you_mean(error.option_name, known, 0.6) + see)
    return UsageError("usage", _in_house_style(error.format_message()), hint=_meant(error) + see)


def _shown(param: click.Parameter) -> list[str]:
    hidden = not isinstance(param, click.Option) or param.hidden
    return [] if hidden else [word for word in (*param.opts, *param.secondary_opts) if word.startswith("--")]


def _meant(error: click.ClickException) -> str:
    """For a word that is none of a list."""
    kind = error.param.type if isinstance(error, click.BadParameter) and error.param is not None else None
    found = _CHOICE.search(error.format_message())
    return did_you_mean(found[1], map(str, kind.choices)) if found and isinstance(kind, click.Choice) else ""


def _in_house_style(text: str) -> str:
    """No capital at the beginning, no full stop at the end."""
    return (text[:1].lower() + text[1:]).removesuffix(".")

"""Filters of the user's own, named as `package.module:function` in the config.

    pair_filters       function(url: str, caption: str) -> str | None
    picture_filters    function(pixels: height × width × RGB uint8, read-only, url: str, caption: str) -> str | None

None keeps the row; a word (small letters, digits, underscores) says why it is left out and becomes its reason. They
come from installed packages only: a module that merely lies in the working directory is not taken, as code must not
depend on where a run was started, and a package has a version for the identity. A filter that raises, or answers
anything else, leaves the row out under `{function}_failed`: what could not be judged is not let in.
"""

import importlib
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from cluster.errors import UserError

_PATH = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)", re.ASCII)
_REASON = re.compile(r"[a-z][a-z0-9_]{0,39}", re.ASCII)


@dataclass
class UserFilter:
    path: str
    function: Callable[..., Any]
    failure: str | None = None  # the first, until it was told
    failed: bool = False

    def __call__(self, *arguments: object) -> str | None:
        try:
            reason = self.function(*arguments)
            if reason is None or (isinstance(reason, str) and _REASON.fullmatch(reason)):
                return reason
            raise TypeError(f"{self.path} answered {reason!r}: expected None or a word such as 'too_dark'")
        except Exception:
            if not self.failed:
                self.failed, self.failure = True, f"the filter {self.path} failed: {traceback.format_exc(limit=-3)}"
            return f"{self.path.rsplit(':')[-1].lower()}_failed"


def user_filter(path: str, setting: str) -> UserFilter:
    """Imports it; that it was installed is for `distribution_of` to say, once. Raises `UserError`."""
    match = _matched(path, setting)
    try:
        function = getattr(importlib.import_module(match["module"]), match["function"])
    except Exception as error:
        raise UserError(f"{setting}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"{setting}: {path} is no function but {function!r}")
    return UserFilter(path, function)


def distribution_of(path: str, setting: str) -> metadata.Distribution:
    """The installed package that a filter comes from. Raises `UserError` where there is none."""
    top = _matched(path, setting)["module"].split(".")[0]
    for distribution in metadata.distributions():
        # A project's folder has metadata too once it was built there; what was installed names its installer.
        if _has_module(distribution, top) and distribution.read_text("INSTALLER") is not None:
            return distribution
    raise UserError(
        f"{setting} names {path!r}, but no installed package has a module {top!r}; filters are taken from installed "
        "packages only: put it into a package and install that with pip"
    )


def _matched(path: str, setting: str) -> re.Match[str]:
    match = _PATH.fullmatch(path)
    if match is None:
        raise UserError(f"{setting} names {path!r}; write package.module:function")
    return match


def _has_module(distribution: metadata.Distribution, top: str) -> bool:
    listed = distribution.read_text("top_level.txt")
    if listed is not None:
        return top in listed.split()
    return any(file.parts[0] in (top, f"{top}.py") for file in distribution.files or ())

"""The command as a person runs it: a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNCLIP = str(Path(sys.executable).parent / "unclip")


class Command:
    """`unclip` with arguments; what it said and its exit code."""

    def __call__(
        self, *arguments: str, timeout_s: float = 600, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, **(env or {})}
        return subprocess.run(
            [UNCLIP, *arguments], capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
        )

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """In a session of its own, so that everything it starts can be killed together."""
        return subprocess.Popen(
            [UNCLIP, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )


@pytest.fixture(scope="session")
def unclip() -> Command:
    return Command()

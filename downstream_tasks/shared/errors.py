"""The error of a task, and how a script ends with it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pikv import PiKVError


class TaskError(PiKVError, ValueError):
    """What a user can mend: the message names the thing, what was expected, what came, and the next step."""


def exit_with(main: Callable[[], None]) -> None:
    """Run a script. What a user can mend ends it with one line and exit code 2, without a traceback."""
    try:
        main()
    except PiKVError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

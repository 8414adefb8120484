"""Owner: who has opened something and gives it back."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self, final


class Owner(abc.ABC):
    """Owns what it opened: close it, or use it as a context manager."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what is held. A second call does nothing."""

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

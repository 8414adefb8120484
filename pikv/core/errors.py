"""What PiKV raises. Each error is also the builtin that a caller would expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pikv.core.ports.streamer import Version
    from pikv.core.reports import LostTokens


class PiKVError(Exception):
    """The base of all errors that PiKV raises on purpose."""


class ConfigError(PiKVError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class InputError(PiKVError, ValueError):
    """A tensor or an argument of the wrong shape, type, device or value."""


class LayerError(PiKVError, IndexError):
    """A layer that the model does not have."""


class UnknownNameError(PiKVError, KeyError):
    """A name that the composer does not know."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class StateError(PiKVError, RuntimeError):
    """An operation that the cache cannot carry out in the state it is in."""


class PoolFullError(PiKVError, MemoryError):
    """The pool has no room for the pages asked for, and the composition does not evict."""


class TransportError(PiKVError, OSError):
    """A collective that failed; names the operation and the rank."""


class TierError(PiKVError, OSError):
    """A memory tier that could not write or read: a full disk, a broken device, a time-out."""


class TierFullError(PiKVError, MemoryError):
    """A memory tier that has no room for a batch of pages."""


class PageLostError(PiKVError, LookupError):
    """A page that is not where it was put, or not as it was: it must be computed again."""


class WaitTimeoutError(PiKVError, TimeoutError):
    """Work on pages that was not finished in the time that its caller would wait. It goes on."""


class StoreError(PiKVError, OSError):
    """A store that could not be written to or read from; what was committed before is still there."""


class DamagedError(StoreError):
    """What a store holds of a version is not what was committed.

    keys: of the pages that are missing or damaged, as far as is known. Of a cache that could not be restored, lost:
    the tokens that would have to be computed again; newest_good: the newest version that is undamaged.
    """

    def __init__(
        self,
        message: str,
        keys: tuple[int, ...] = (),
        *,
        lost: tuple[LostTokens, ...] = (),
        newest_good: Version | None = None,
    ) -> None:
        super().__init__(message)
        self.keys, self.lost, self.newest_good = keys, lost, newest_good


class VersionError(PiKVError, LookupError):
    """A version that a store does not have, or a format that is newer than this PiKV."""

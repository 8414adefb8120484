"""What has gone through a pool's tiers: counters that only grow, for people and for exporters."""

from __future__ import annotations

import attrs


@attrs.define(kw_only=True)
class NearUse:
    """Pages that layers asked for: hits lay near, coming ones were on their way, misses were far.

    foreseen: pages that were fetched ahead; used: those of them that were asked for before they went far again. Counted
    where there are tiers.
    """

    hits: int = 0
    coming: int = 0
    misses: int = 0
    foreseen: int = 0
    used: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of pages that nobody had to wait for; 0 before any."""
        return self.hits / max(1, self.hits + self.coming + self.misses)

    def __str__(self) -> str:
        return (
            f"near: {self.hits} pages found, {self.coming} on their way, {self.misses} far ({self.hit_rate:.1%} found)"
        )


@attrs.define(kw_only=True)
class TierUse:
    """What has gone through one far tier.

    hits, misses: pages that were asked for when no nearer tier had them, and that it had or had not. read_s, write_s:
    the time that its reads and writes took. exposed_s: how long somebody stood still for its reads. foreseen_s: what of
    read_s was begun before the pages were needed; of that, foreseen_exposed_s was waited for all the same, and hidden_s
    was not. queued: calls that wait for the tier now.
    """

    name: str
    hits: int = 0
    misses: int = 0
    pages_written: int = 0
    bytes_written: int = 0
    write_s: float = 0.0
    pages_read: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    exposed_s: float = 0.0
    hidden_s: float = 0.0
    foreseen_s: float = 0.0
    foreseen_exposed_s: float = 0.0
    failures: int = 0
    queued: int = 0

    def waited(self, read_s: float, exposed_s: float, *, foreseen: bool) -> None:
        """Count a read that took so long, and was waited for so long."""
        self.read_s += read_s
        self.exposed_s += exposed_s
        if foreseen:
            self.hidden_s += max(0.0, read_s - exposed_s)
            self.foreseen_s += read_s
            self.foreseen_exposed_s += exposed_s

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.pages_written} pages written, {self.bytes_written / 2**20:.1f} MiB in "
            f"{self.write_s:.3f} s; {self.pages_read} read, {self.bytes_read / 2**20:.1f} MiB in {self.read_s:.3f} s, "
            f"of which {self.hidden_s:.3f} s were hidden and {self.exposed_s:.3f} s waited for; {self.misses} pages "
            f"were elsewhere; {self.failures} failures, {self.queued} calls wait"
        )


@attrs.frozen(kw_only=True)
class PoolUse:
    """A pool at one moment: the bytes of all pages, how many may lie near, and what has gone through the tiers."""

    used_bytes: int
    near_bytes: int
    near: NearUse
    tiers: tuple[TierUse, ...]

    @property
    def hidden_of_right(self) -> float:
        """The share of the time to fetch what was foreseen rightly that nobody waited for; 0 before any.

        A page takes its share of the time of all that were fetched ahead. Every wait for any of them counts against it.
        """
        right_s = sum(tier.foreseen_s for tier in self.tiers) * self.near.used / max(1, self.near.foreseen)
        return max(0.0, 1 - sum(tier.foreseen_exposed_s for tier in self.tiers) / right_s) if right_s else 0.0

    def __str__(self) -> str:
        """A line for each place."""
        held = f"{self.used_bytes / 2**20:.1f} MiB of pages, {self.near_bytes / 2**20:.1f} MiB may lie near"
        return "\n".join([held, *map(str, (self.near, *self.tiers) if self.tiers else ())])

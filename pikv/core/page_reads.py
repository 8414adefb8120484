"""What decoded tokens read of the sealed pages, counted as it is read, and what they leave out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports.backend import Choice
from pikv.core.ports.selector import PageSelector

if TYPE_CHECKING:
    from pikv.core.pool import PagePool
    from pikv.core.serving import Served


@attrs.frozen(kw_only=True)
class LayerReads:
    """What the tokens decoded so far have read of one layer's sealed pages, all together.

    steps: calls of `attend` for one token a sequence. pages and page_bytes were read, stored_pages and stored_bytes
    would have been if everything was. index_bytes: of the page selector, read to choose.
    left_out: the share of attention that went to pages which were not read, estimated, the mean over steps, sequences
    and query heads; None where a choice did not estimate it. true_left_out: the same, measured, over the steps that
    were audited; None if none was.
    """

    steps: int
    pages: int
    stored_pages: int
    page_bytes: int
    index_bytes: int
    stored_bytes: int
    left_out: float | None
    true_left_out: float | None

    @property
    def read_bytes(self) -> int:
        """Pages and index."""
        return self.page_bytes + self.index_bytes

    def __str__(self) -> str:
        """One line."""
        stored = max(1, self.stored_bytes)
        line = f"pages {self.page_bytes / stored:.1%}, index {self.index_bytes / stored:.1%} of the page bytes"
        for name, share in (("left out", self.left_out), ("truly left out", self.true_left_out)):
            line += "" if share is None else f", {name} {share:.2%}"
        return line


@attrs.frozen
class PageReads:
    """The reads of each layer that has decoded a token, by its number."""

    layers: dict[int, LayerReads]

    @property
    def page_bytes(self) -> int:
        """Of the pages that were read, in all layers."""
        return sum(layer.page_bytes for layer in self.layers.values())

    @property
    def index_bytes(self) -> int:
        """Of the page selector's index, read to choose, in all layers."""
        return sum(layer.index_bytes for layer in self.layers.values())

    @property
    def stored_bytes(self) -> int:
        """Of the pages that there were to be read, in all layers."""
        return sum(layer.stored_bytes for layer in self.layers.values())

    def __str__(self) -> str:
        """One line a layer."""
        return "\n".join(f"layer {layer_id:<3} {reads}" for layer_id, reads in self.layers.items())


@attrs.define
class LayerReadCounter:
    """What is summed up for one layer."""

    steps: int = 0
    pages: int = 0
    stored_pages: int = 0
    indexed_pages: int = 0
    estimated: bool = True
    left_out: Tensor | float = 0.0
    audited_steps: int = 0
    true_left_out: Tensor | float = 0.0

    def read_all(self, pages: int) -> None:
        """Note a step that read so many pages, which are all."""
        self.steps += 1
        self.pages += pages
        self.stored_pages += pages

    def read_some(self, choice: Choice, pages: int) -> None:
        """Note a step that chose among so many pages."""
        self.steps += 1
        self.pages += int(choice.reads.sum())
        self.stored_pages += pages
        self.indexed_pages += pages
        self.estimated &= choice.left_out is not None
        if choice.left_out is not None:
            self.left_out = self.left_out + choice.left_out.mean()

    def audit(self, left_out: Tensor | float) -> None:
        """Note what a step truly left out."""
        self.audited_steps += 1
        self.true_left_out = self.true_left_out + left_out

    def report(self, *, page_bytes: int, index_bytes: int) -> LayerReads:
        """The sums, of pages of this size and with an index of this size each."""
        audited = self.audited_steps > 0
        return LayerReads(
            steps=self.steps,
            pages=self.pages,
            stored_pages=self.stored_pages,
            page_bytes=self.pages * page_bytes,
            index_bytes=self.indexed_pages * index_bytes,
            stored_bytes=self.stored_pages * page_bytes,
            left_out=float(self.left_out) / self.steps if self.estimated else None,
            true_left_out=float(self.true_left_out) / self.audited_steps if audited else None,
        )


@attrs.define
class ReadCounter:
    """A cache's page selector, and what it has read. audits: whether what is left out is measured too."""

    selector: PageSelector | None
    audits: bool = attrs.field(default=False, init=False)
    _layers: dict[int, LayerReadCounter] = attrs.field(factory=dict, init=False)

    def layer(self, layer_id: int) -> LayerReadCounter:
        """The sums of one layer."""
        return self._layers.setdefault(layer_id, LayerReadCounter())

    def auditing(self) -> AbstractContextManager[None]:
        """While this is open, reads are audited. Raises ConfigError without a selector."""
        self._check()
        return self._auditing()

    @contextmanager
    def _auditing(self) -> Iterator[None]:
        before, self.audits = self.audits, True
        try:
            yield
        finally:
            self.audits = before

    def _check(self) -> None:
        if self.selector is None:
            raise ConfigError("page reads are counted for a page_selector; without one every token reads all pages")

    def report(self, served: Sequence[Served], pool: PagePool) -> PageReads:
        """The sums as they stand; ConfigError without a selector.

        served: how each layer's pages are encoded. pool: that has their indexes.
        """
        self._check()
        forms = {layer_id: served[layer_id].codec.form for layer_id in sorted(self._layers)}
        return PageReads(
            {
                layer_id: self._layers[layer_id].report(
                    page_bytes=form.stride, index_bytes=pool.index_bytes_a_page(form)
                )
                for layer_id, form in forms.items()
            }
        )


def left_out(choice: Choice, page_lse: Tensor, total: Tensor) -> Tensor:
    """The share of attention that goes to pages which are not read, the mean over all queries.

    page_lse: [sequences, kv_heads, group, pages], the log-sum-exp of each page's scores; total: [sequences, kv_heads,
    group], of everything.
    """
    columns, device = choice.columns, page_lse.device
    valid = torch.arange(columns.shape[-1], device=device) < choice.reads.to(device)[..., None]
    times = torch.zeros_like(page_lse[:, :, 0], dtype=torch.int64).scatter_add(-1, columns, valid.long())
    return torch.exp(page_lse - total[..., None]).masked_fill(times[:, :, None] > 0, 0.0).sum(-1).mean()

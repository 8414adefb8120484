"""What every backend's choice and sealing of pages must do: derive from this, say how yours is made, run pytest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.config import LayerConfig
from pikv.core.exact import Exact
from pikv.core.ports import (
    Backend,
    Choice,
    IndexedPages,
    IndexForm,
    IndexMeaning,
    MassSelector,
    NewPages,
    PageCodec,
    PageIndex,
    PageSelector,
    SealKernel,
)
from pikv.core.tail import Tail
from pikv.testing.backend import CPU, codec
from pikv.testing.true_mass import TrueMass


class PageKernelConformance:
    """The suite: choices are as good as the selector's, and pages have the compressor's bytes."""

    tolerance = 1e-5
    """Of scores, relative to their size, within which either page may be chosen."""
    share_tolerance = 1e-5
    """The same of shares of attention, for selectors that estimate these."""

    def make(self) -> Backend:
        """The backend under test."""
        raise TypeError(f"{type(self).__name__} must define make(), which returns the backend under test")

    def codecs(self) -> Iterable[PageCodec]:
        """The codecs to seal for; the backend may have no kernel for some."""
        for page_size in (16, 64):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                yield codec(Exact(), page_size=page_size, value_dim=48, dtype=dtype)

    def selectors(self) -> Iterable[PageSelector]:
        """The page selectors to choose and to index for; the backend may have no kernel for some."""
        yield KeyBounds(pages=3)
        yield TrueMass(pages=3)
        for mass in (0.3, 0.9, 1.0):
            yield TrueMass(pages=30, mass=mass, min_pages=2)

    def choices(self) -> Iterator[ChoiceMade]:
        """What the backend chooses for its selectors, in layers of several shapes."""
        for selector in self.selectors():
            for kv_heads, group, key_dim, width in ((2, 3, 32, 9), (1, 1, 64, 3), (3, 2, 16, 200)):
                each = codec(Exact(), page_size=16, kv_heads=kv_heads, group=group, key_dim=key_dim)
                kernel = self.make().choose(selector, each, CPU)
                if kernel is not None:
                    pages, query = some_indexed_pages(selector, each, width), _random(2, kv_heads, group, key_dim)
                    beside = _random(2, kv_heads, group) if isinstance(selector, MassSelector) else None
                    choice = kernel(query, pages, beside=beside)
                    yield ChoiceMade(selector, each, choice, pages, query * each.layer.scale, beside)

    def test_chooses_the_newest_and_the_best(self) -> None:
        """The columns increase, the newest page is among them, and no page that is left out weighs more."""
        for made in self.choices():
            columns, reads, weights = made.choice.columns, made.choice.reads, made.weights()
            assert columns.shape == (*reads.shape, min(made.selector.pages, made.pages.ids.shape[-1]))
            assert bool(((columns >= 0) & (columns < made.pages.ids.shape[-1])).all())
            for at in itertools.product(*map(range, reads.shape)):
                count, read = int(made.pages.counts[at]), columns[at][: int(reads[at])].tolist()
                assert read == sorted(set(read))
                assert read[-1] == count - 1
                rest = [float(weights[at][column]) for column in range(count) if column not in read]
                worst = min((float(weights[at][column]) for column in read[:-1]), default=math.inf)
                assert not rest or worst >= max(rest) - self._tolerance(made) * (1 + abs(worst))

    def _tolerance(self, made: ChoiceMade) -> float:
        return self.share_tolerance if isinstance(made.selector, MassSelector) else self.tolerance

    def test_reads_as_many_as_wanted(self) -> None:
        """So many as there may be; or for a mass as few as reach it, and what is left out is said."""
        for made in self.choices():
            most = made.pages.counts.clamp(max=made.selector.pages)
            if not isinstance(made.selector, MassSelector):
                assert torch.equal(made.choice.reads, most)
                assert made.choice.left_out is None
                continue
            assert made.choice.left_out is not None
            torch.testing.assert_close(made.choice.left_out, made.left_out(), atol=self.share_tolerance, rtol=0)
            if made.selector.mass is None:
                assert torch.equal(made.choice.reads, most)
            else:
                self._check_fewest(made, made.selector.mass, most)

    def _check_fewest(self, made: ChoiceMade, mass: float, most: Tensor) -> None:
        assert isinstance(made.selector, MassSelector)
        reads, least = made.choice.reads, most.clamp(max=made.selector.min_pages)
        assert bool(((reads >= least) & (reads <= most)).all())
        assert bool(((made.left_out() <= 1 - mass + self.share_tolerance) | (reads == most)).all())
        assert bool(((made.left_out(but=1) > 1 - mass - self.share_tolerance) | (reads == least)).all())

    def test_seals_as_the_compressor_encodes(self) -> None:
        """Bytes and index are those that compressor and selector write, from tail slots in any order."""
        for each in self.codecs():
            for selector in (None, *self.selectors()):
                kernel = self.make().seal(each, selector, CPU)
                if kernel is not None:
                    self._check_sealed(each, selector, kernel, some_tail(each))

    def _check_sealed(
        self, each: PageCodec, selector: PageSelector | None, kernel: SealKernel, given: tuple[Tail, NewPages]
    ) -> None:
        tail, new = given
        place = new.sequence[:, None], new.head[:, None], new.slots
        tokens = [states[place] for states in (tail.keys, tail.values, tail.positions)]
        wanted, got = torch.zeros(2, len(new.slots), each.form.stride, dtype=torch.uint8)
        each.compressor.encode(each.form, *tokens, wanted)
        index = kernel(tail, new, got)
        assert torch.equal(got, wanted)
        if selector is None:
            assert index is None
            return
        assert index is not None
        bounds = torch.empty_like(index)
        selector.index(each.compressor.decode(each.form, wanted)[0], bounds)
        assert torch.equal(index, bounds)


@final
@attrs.frozen(kw_only=True)
class KeyBounds(PageSelector):
    """The plainest page selector whose index is of bounds."""

    pages: int
    dense_layers: int = 0

    def index_form(self, layer: LayerConfig, page_size: int) -> IndexForm:
        """See IndexMeaning.BOUNDS."""
        return IndexForm(torch.float16, (2, layer.key_dim), IndexMeaning.BOUNDS)

    def index(self, keys: Tensor, out: Tensor) -> None:
        """By the next float16, and the one after that where rounding went inwards."""
        for side, (bound, away) in enumerate(((keys.amin(1).float(), -math.inf), (keys.amax(1).float(), math.inf))):
            near = bound.to(torch.float16)
            inwards = near.float() > bound if side == 0 else near.float() < bound
            out[:, side] = torch.where(inwards, near.nextafter(near.new_tensor(away)), near)

    def score(self, index: PageIndex, query: Tensor) -> Tensor:
        """The sum over the channels of the greater product, the greatest over the group."""
        bounds = index.arrays.float()[:, :, None]  # [sequences, kv_heads, 1, pages, 2, key_dim]
        products = query.float()[:, :, :, None, None] * bounds
        return products.amax(-2).sum(-1).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).amax(2)


@attrs.frozen
class ChoiceMade:
    """A choice, and what it was made from. query: scaled; beside: as the kernel was given it."""

    selector: PageSelector
    codec: PageCodec
    choice: Choice
    pages: IndexedPages
    query: Tensor
    beside: Tensor | None

    def weights(self) -> Tensor:
        """By which pages are compared, float64 [sequences, kv_heads, pages]: scores, or shares of attention."""
        present = torch.arange(self.pages.ids.shape[-1]) < self.pages.counts[..., None]
        index = PageIndex(arrays=self.pages.index[self.pages.ids], present=present, layer=self.codec.layer)
        if self.beside is None or not isinstance(self.selector, MassSelector):
            return self.selector.score(index, self.query).double()
        mass = self.selector.log_mass(index, self.query).double().masked_fill(~present[:, :, None], -math.inf)
        everything = torch.cat([self.beside.double()[..., None], mass], dim=-1)
        return everything.softmax(-1).mean(2)[..., 1:]

    def left_out(self, *, but: int = 0) -> Tensor:
        """The share of attention to pages that are not read, or would not be if the lightest `but` were left out too.

        float32 [sequences, kv_heads]. The newest page is not the lightest.
        """
        weights = self.weights()
        total = weights.sum(-1)
        for at in itertools.product(*map(range, total.shape)):
            read = weights[at][self.choice.columns[at][: int(self.choice.reads[at])]]
            total[at] -= read.sum() - read[:-1].sort().values[:but].sum()
        return total.float()


def some_indexed_pages(selector: PageSelector, each: PageCodec, width: int) -> IndexedPages:
    """Pages [2 sequences, kv_heads, width] whose index lies in any order; some rows have fewer, one has one."""
    generator, layer, page_size = torch.Generator().manual_seed(width), each.layer, each.form.page_size
    form, count = selector.index_form(layer, page_size), 2 * layer.kv_heads * width
    index = torch.empty(count + 5, *form.shape, dtype=form.dtype)
    selector.index(torch.randn(count + 5, page_size, layer.key_dim, generator=generator), index)
    counts = torch.randint(1, width + 1, (2, layer.kv_heads), generator=generator)
    counts[0, 0], counts[1, 0] = width, 1
    ids = torch.randperm(count, generator=generator).int().view(2, layer.kv_heads, width)
    return IndexedPages(index=index, ids=ids, counts=counts)


def some_tail(each: PageCodec) -> tuple[Tail, NewPages]:
    """A tail of 2 sequences, and pages of any of its slots; numbers of many sizes, some alike, zeros of both signs."""
    generator, layer, page_size = torch.Generator().manual_seed(6), each.layer, each.form.page_size
    shape = (2, layer.kv_heads, 3 * page_size)
    keys = torch.randn(*shape, layer.key_dim, generator=generator) * 10.0 ** torch.randint(-6, 3, (layer.key_dim,))
    values = torch.randn(*shape, layer.value_dim, generator=generator)
    keys[..., 0], values[:, :, 0], values[:, :, 1, ::2] = -0.0, 0.5, -0.0
    positions = torch.randint(0, 10_000, shape, generator=generator, dtype=torch.int32)
    tail = Tail(
        keys.to(each.dtype), values.to(each.dtype), positions, torch.full(shape[:2], shape[2]), each.layer.value_dim
    )
    sequence, head = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 0, 0]) % layer.kv_heads
    slots = torch.stack([torch.randperm(shape[2], generator=generator)[:page_size].sort().values for _ in sequence])
    slots[0] = torch.arange(page_size)
    return tail, NewPages(sequence=sequence, head=head, slots=slots)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))

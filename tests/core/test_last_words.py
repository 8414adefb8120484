"""What is said where a selector, a part or a caller asks for what cannot be."""

from __future__ import annotations

import attrs
import pytest
import torch

import pikv
from pikv.core.exact import Exact
from pikv.core.ports import Pages, TokenSelector
from pikv.core.ports.transport import Solo
from pikv.core.torch_backend import TorchBackend
from pikv.policies import Quest
from pikv.testing import backend

MODEL = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=4)


def test_a_cropped_update_cannot_be_asked_about() -> None:
    """A crop that takes the last update's tokens leaves nothing to attend from: StateError, call update."""
    cache = pikv.PiKVCache(MODEL)
    cache.update(0, 0, *torch.ones(2, 1, 1, 30, 4))
    cache.crop(20)
    with pytest.raises(pikv.StateError, match="brought no tokens, or was cropped; call update first"):
        cache.attend(0, torch.ones(1, 2, 30, 4))


def test_a_part_in_the_wrong_place_is_refused() -> None:
    """A page selector is no token selector, a class is no object, and a name is for runtime_from."""
    for wrong in (Quest(), Quest, "recent"):
        with pytest.raises(pikv.ConfigError, match="token_selector must be a TokenSelector object, got"):
            pikv.compose(MODEL, token_selector=wrong, budget_tokens=256)


def test_a_score_that_is_no_number_is_refused() -> None:
    """NaN does not say whether a token stays: StateError names the selector, and nothing has left."""

    @attrs.frozen(kw_only=True)
    class Undecided(TokenSelector):
        sinks: int = 0
        recent: int = 0

        def score(self, view):
            return torch.full(view.positions.shape, torch.nan)

    cache = pikv.compose(MODEL, token_selector=Undecided(), budget_tokens=32, page_size=16, tail_tokens=16)
    cache.update(0, 0, *torch.ones(2, 1, 1, 40, 4))
    with pytest.raises(pikv.StateError, match="Undecided scored a token NaN"):
        cache.attend(0, torch.ones(1, 2, 40, 4))
    assert cache.retrieve(0).keys.shape[2] == 40


def test_a_transport_says_which_rank_it_is() -> None:
    """Its rank and how many there are."""
    assert repr(Solo()) == "Solo(rank=0, size=1)"


def test_no_pages_at_all() -> None:
    """A kernel that is given no page answers as from no token."""
    codec = backend.codec(Exact())
    some = backend.some_pages(codec, seed=0)
    none = Pages(slab=some.slab, rows=some.rows[..., :0], live=some.live[..., :0], run=None)
    part = TorchBackend().attend(codec, torch.device("cpu"))(backend.some_queries(codec), none)
    assert not part.output.any()
    assert bool((part.log_sum_exp == -torch.inf).all())

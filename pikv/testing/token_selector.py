"""The facts that every TokenSelector must hold to, as tests to inherit.

class TestMine(TokenSelectorConformance):
    def make(self) -> TokenSelector:
        return Mine()
"""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pikv.core.ports import AttendedTokenSelector, QueryTokenSelector, TokenSelector
from pikv.testing.policy import PolicyConformance, assert_close, assert_equal, inherited
from pikv.testing.requests import StoredTokens, stored_tokens


class TokenSelectorConformance(PolicyConformance):
    """Inherit, and say what `make` makes. Selectors that look at queries are shown as many as they ask for."""

    def make(self) -> TokenSelector:
        """Make the selector to test, with the same settings every time."""
        raise NotImplementedError("make: return the selector to test")

    def stored(self, data: st.DataObject) -> StoredTokens:
        """Draw what the selector is to score."""
        selector = self.make()
        return data.draw(stored_tokens(selector.window if isinstance(selector, QueryTokenSelector) else 1))

    def test_protected_sets_are_counts(self) -> None:
        """How many tokens are kept whatever their score is a whole number, and not negative."""
        for name in ("sinks", "recent"):
            count = getattr(self.make(), name)
            assert isinstance(count, int), f"{name} is {count!r}"
            assert count >= 0, f"{name} is {count}"

    @inherited
    @given(data=st.data())
    def test_every_token_has_a_finite_score(self, data: st.DataObject) -> None:
        """Scores are [sequences, kv_heads, tokens], finite where there is a token; elsewhere anything."""
        stored = self.stored(data)
        scores = self.make().score(stored.view())
        assert scores.shape == stored.positions.shape, f"{list(scores.shape)} for {list(stored.positions.shape)}"
        assert bool(scores[stored.present].isfinite().all()), f"got {scores.tolist()} at {stored.positions.tolist()}"

    @inherited
    @given(data=st.data())
    def test_the_same_tokens_have_the_same_scores(self, data: st.DataObject) -> None:
        """Nothing but the view decides, bit by bit."""
        stored = self.stored(data)
        once, again = (self.make().score(tokens.view())[stored.present] for tokens in (stored, stored.copied()))
        assert_equal(again, once, "scores the second time")

    @inherited
    @given(data=st.data())
    def test_a_sequence_does_not_depend_on_the_others(self, data: st.DataObject) -> None:
        """The tokens of a sequence score in a batch what they score alone."""
        stored = self.stored(data)
        scores = self.make().score(stored.view())
        for i in range(len(scores)):
            alone = stored.sequence(i)
            got = self.make().score(alone.view())[alone.present]
            assert_close(got, scores[i : i + 1][alone.present], f"scores of sequence {i} alone")

    @inherited
    @given(data=st.data())
    def test_what_lies_in_empty_slots_does_not_matter(self, data: st.DataObject) -> None:
        """Keys and values where there is no token are left over from others, and weigh nothing."""
        stored = self.stored(data)
        empty = ~stored.present[..., None]
        other = attrs.evolve(
            stored, keys=stored.keys.masked_fill(empty, 50.0), values=stored.values.masked_fill(empty, 50.0)
        )
        once, again = (self.make().score(tokens.view())[stored.present] for tokens in (stored, other))
        assert_close(again, once, "scores with other numbers in empty slots")

    @inherited
    @given(data=st.data())
    def test_room_at_the_end_does_not_matter(self, data: st.DataObject) -> None:
        """A row among longer ones scores what it scores alone."""
        stored = self.stored(data)
        longer = attrs.evolve(
            stored,
            positions=F.pad(stored.positions, (0, 3), value=-1),
            keys=F.pad(stored.keys, (0, 0, 0, 3)),
            values=F.pad(stored.values, (0, 0, 0, 3)),
            attended=F.pad(stored.attended, (0, 3)),
        )
        once, again = (self.make().score(tokens.view())[tokens.present] for tokens in (stored, longer))
        assert_close(again, once, "scores with three empty slots more")

    @inherited
    @given(data=st.data())
    def test_it_changes_nothing(self, data: st.DataObject) -> None:
        """The view's tensors stay as they are."""
        stored = self.stored(data)
        before = stored.copied().tensors()
        self.make().score(stored.view())
        for name, states in stored.tensors().items():
            assert_equal(states, before[name], f"{name} after")

    @inherited
    @given(data=st.data())
    def test_rows_without_tokens(self, data: st.DataObject) -> None:
        """A row may have slots and no token, and all rows may have no slots."""
        stored = self.stored(data)
        nothing = attrs.evolve(
            stored, positions=torch.full_like(stored.positions, -1), asked=torch.full_like(stored.asked, -1)
        )
        no_slots = attrs.evolve(
            nothing,
            positions=nothing.positions[..., :0],
            keys=nothing.keys[:, :, :0],
            values=nothing.values[:, :, :0],
            attended=nothing.attended[..., :0],
        )
        for tokens in (nothing, no_slots):
            scores = self.make().score(tokens.view())
            assert scores.shape == tokens.positions.shape, f"{list(scores.shape)} for {list(tokens.positions.shape)}"


class AttendedTokenSelectorConformance(TokenSelectorConformance):
    """The same for selectors that remember attention; `make` makes one."""

    def make(self) -> AttendedTokenSelector:
        """Make the selector to test, with the same settings every time."""
        raise NotImplementedError("make: return the selector to test")

    @inherited
    @given(data=st.data())
    def test_what_is_remembered_is_finite(self, data: st.DataObject) -> None:
        """`fold` gives [sequences, kv_heads, tokens], finite where there is a token, and changes nothing."""
        stored = self.stored(data)
        before = stored.copied().tensors()
        folded = self.make().fold(stored.view())
        assert folded.shape == stored.positions.shape, f"{list(folded.shape)} for {list(stored.positions.shape)}"
        assert bool(folded[stored.present].isfinite().all()), f"got {folded.tolist()} at {stored.positions.tolist()}"
        for name, states in stored.tensors().items():
            assert_equal(states, before[name], f"{name} after")

    @inherited
    @given(data=st.data())
    def test_scores_follow_what_is_remembered(self, data: st.DataObject) -> None:
        """A token of which more is remembered does not score lower than without it."""
        stored = self.stored(data)
        more = attrs.evolve(stored, attended=stored.attended + stored.present.float())
        less, higher = (self.make().score(tokens.view())[stored.present] for tokens in (stored, more))
        assert bool((higher >= less).all()), f"{higher.tolist()} with more remembered, {less.tolist()} before"

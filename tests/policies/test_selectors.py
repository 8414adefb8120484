from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given

from pikv import ConfigError
from pikv.core.exact import KeepAll
from pikv.core.ports import TokenSelector
from pikv.policies import Importance, Recent
from pikv.testing.requests import StoredTokens, stored_tokens
from pikv.testing.token_selector import TokenSelectorConformance

pytestmark = pytest.mark.property


class TestKeepAll(TokenSelectorConformance):
    def make(self) -> KeepAll:
        return KeepAll()

    @given(stored=stored_tokens(1))
    def test_all_tokens_matter_the_same(self, stored: StoredTokens):
        """No score is below another."""
        assert not KeepAll().score(stored.view()).any()


class TestRecent(TokenSelectorConformance):
    def make(self) -> Recent:
        return Recent()

    @given(stored=stored_tokens(1))
    def test_newest_first(self, stored: StoredTokens):
        """Scores grow along a row: the older a token, the earlier it leaves."""
        scores = Recent().score(stored.view())
        for row, present in zip(scores.flatten(0, 1), stored.present.flatten(0, 1), strict=True):
            assert bool((row[present].diff() > 0).all())

    @pytest.mark.parametrize("settings", [{"sinks": -1}, {"recent": -1}])
    def test_negative_counts_are_refused(self, settings):
        """Counts of tokens."""
        with pytest.raises(ConfigError, match="must be a whole number of at least 0"):
            Recent(**settings)


class TestImportance(TokenSelectorConformance):
    def make(self) -> Importance:
        return Importance(window=3)

    @given(stored=stored_tokens(3))
    def test_it_is_the_attention_that_a_token_gets(self, stored: StoredTokens):
        """I_t = sum_h softmax(Q_h K_t / sqrt(d)) over the group's heads and the window's queries, one by one."""
        scores = Importance(window=3).score(stored.view())
        expected = torch.zeros(stored.positions.shape)
        group, scale = stored.layer.group, stored.layer.scale
        for s, h, w in torch.cartesian_prod(*map(torch.arange, (stored.queries.shape[0], stored.queries.shape[1], 3))):
            row = stored.positions[s, h // group]
            seen = (row >= 0) & (row <= stored.asked[s, w])
            logits = stored.keys[s, h // group, seen] @ stored.queries[s, h, w] * scale
            expected[s, h // group, seen] += logits.softmax(-1)
        torch.testing.assert_close(scores[stored.present], expected[stored.present])

    @pytest.mark.parametrize("settings", [{"window": 0}, {"sinks": -1}, {"recent": -1}])
    def test_counts_that_cannot_work_are_refused(self, settings):
        """The message names all three."""
        with pytest.raises(ConfigError, match="must be a whole number of at least"):
            Importance(**settings)


@attrs.frozen
class Broken(TokenSelector):
    """The norms of the keys with one defect, named by the test of the suite that must find it."""

    defect: str

    @property
    def sinks(self):
        return -1 if self.defect == "protected_sets_are_counts" else 0

    @property
    def recent(self):
        return 0

    def score(self, view):
        norms = view.keys.norm(dim=-1).masked_fill(view.positions < 0, 0)
        CALLS.append(1)
        broken = {
            "every_token_has_a_finite_score": lambda: norms.log() - torch.inf,
            "the_same_tokens_have_the_same_scores": lambda: norms + len(CALLS),
            "a_sequence_does_not_depend_on_the_others": lambda: norms - norms.sum(),
            "what_lies_in_empty_slots_does_not_matter": lambda: norms - view.keys.sum((2, 3))[..., None],
            "room_at_the_end_does_not_matter": lambda: norms + norms.shape[-1],
            "it_changes_nothing": lambda: view.keys.mul_(2).norm(dim=-1),
            "rows_without_tokens": lambda: norms - norms.amax(-1, keepdim=True),
        }
        return broken.get(self.defect, lambda: norms)()


CALLS: list[int] = []


@pytest.mark.slow  # hypothesis looks for the simplest case of each
@pytest.mark.parametrize(
    "defect", sorted(name[5:] for name in vars(TokenSelectorConformance) if name.startswith("test_"))
)
def test_the_suite_finds_a_defect(defect):
    """Each test of the suite fails for a selector that breaks the fact it states."""

    class Suite(TokenSelectorConformance):
        def make(self) -> TokenSelector:
            return Broken(defect)

    with pytest.raises((AssertionError, ExceptionGroup, IndexError)):
        getattr(Suite(), f"test_{defect}")()

"""A press whose score needs only what a TokenView holds is a token selector; others are refused with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, final

import attrs
import torch
from kvpress.presses.scorer_press import ScorerPress
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import QueryTokenSelector, TokenSelector
from pikv.core.views import TokenView

_BY_KEYS = ("KnormPress", "KeyDiffPress", "LagKVPress", "CURPress")  # keys and values, nothing else
_BY_QUERIES = {"SnapKVPress": "window_size"}  # also the attention of the newest queries, as many as this field says
_REFUSED = {
    "TOVAPress": "it averages over all heads of a layer, which hold different tokens here; the nearest is Tova()",
    "StreamingLLMPress": "its score depends on its compression_ratio; the nearest is Recent()",
    "RandomPress": "its score is not the same twice",
    "ExpectedAttentionPress": "it needs the hidden states of the whole prompt; the nearest is ExpectedAttention()",
    "ObservedAttentionPress": "it needs the whole attention matrix; the nearest is HeavyHitters()",
    "PyramidKVPress": "it splits the budget between layers; compose SnapKV() with Pyramid()",
    "AdaKVPress": "it splits the budget between heads; compose the selector with AdaKV()",
    "DuoAttentionPress": "it splits the budget between heads; compose the selector with DuoAttention()",
    "ChunkKVPress": "it chooses tokens itself; the nearest is ChunkKV()",
    "KVzipPress": "it runs the model a second time; the nearest is KVzip(), with host.rehearse",
    "QFilterPress": "it loads filters from a hub for one model",
    "LeverageScorePress": "it needs hidden states and draws at random",
}


def selector_of(press: Any, *, sinks: int = 4, recent: int = 32) -> TokenSelector:
    """Use a press of kvpress as a token selector: with real ragged memory, chunked prompts and budgets while decoding.

    Its compression_ratio is of no account: the budget is the cache's. sinks, recent: tokens that stay whatever their
    score; a press that looks at the newest queries keeps their window too. Raises ConfigError for a press that needs
    more than a TokenView holds, with the reason.
    """
    name = type(press).__name__
    if not isinstance(press, ScorerPress) or name not in (*_BY_KEYS, *_BY_QUERIES):
        reason = _REFUSED.get(name, "it is not known to score by keys, values and the newest queries alone")
        raise ConfigError(f"{name} cannot be a token selector: {reason}; those that can are {_known()}")
    if getattr(press, "use_random_leverage", False):
        raise ConfigError(f"{name} with use_random_leverage draws at random, so its score is not the same twice")
    if name in _BY_KEYS:
        return KeyPress(press=press, sinks=sinks, recent=recent)
    window = getattr(press, _BY_QUERIES[name])
    return QueryPress(press=press, sinks=sinks, recent=max(recent, window), window=window)


def _known() -> str:
    return ", ".join((*_BY_KEYS, *_BY_QUERIES))


@final
@attrs.frozen(kw_only=True)
class KeyPress(TokenSelector):
    """A press that scores by keys and values; made by `selector_of`."""

    press: ScorerPress = attrs.field(eq=repr)  # presses can be changed, so they have no hash
    sinks: int
    recent: int

    def score(self, view: TokenView) -> Tensor:
        """The press's score of each row's own tokens: [sequences, kv_heads, tokens]."""
        return _by_row(self.press, view, attention=None)


@final
@attrs.frozen(kw_only=True)
class QueryPress(QueryTokenSelector):
    """A press that also looks at the attention of the newest queries; made by `selector_of`."""

    press: ScorerPress = attrs.field(eq=repr)
    sinks: int
    recent: int
    window: int

    def score(self, view: TokenView) -> Tensor:
        """The press's score of each row's own tokens; a row no longer than the window stays."""
        scores = _by_row(self.press, view, attention=view.attention(), least=self.window + 1)
        lengths = (view.positions >= 0).sum(-1, keepdim=True)
        in_window = torch.arange(scores.shape[-1], device=scores.device) >= lengths - self.window
        return scores.masked_fill(in_window, 2.0)  # more than any mean; the press puts there what other rows say


def _by_row(press: ScorerPress, view: TokenView, *, attention: Tensor | None, least: int = 1) -> Tensor:
    """Rows of the same length at a time, each as a sequence with one KV head: a press knows no empty slots."""
    lengths = (view.positions >= 0).sum(-1).flatten()
    keys, values = view.keys.flatten(0, 1)[:, None], view.values.flatten(0, 1)[:, None]
    scores = torch.zeros(len(lengths), view.positions.shape[-1], device=view.positions.device)
    config = SimpleNamespace(num_attention_heads=view.layer.group, num_key_value_heads=1)
    for length in lengths.unique().tolist():
        rows = lengths == length
        if length < least:
            continue
        hidden = torch.empty(int(rows.sum()), length, 0)  # for its length alone
        seen = None if attention is None else attention.flatten(0, 1)[rows, ..., :length]
        scored = press.score(
            SimpleNamespace(config=config), hidden, keys[rows, :, :length], values[rows, :, :length], seen, {}
        )
        scores[rows, :length] = scored[:, 0].float()
    return scores.view(view.positions.shape)

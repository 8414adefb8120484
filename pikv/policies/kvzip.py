"""Tokens that the model looks at when it repeats the text."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from pikv.core.ports import SecondPassSelector
from pikv.core.views import TokenView
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class KVzip(SecondPassSelector):
    """Keep what the model needs to repeat the text. Source: KVzip, arXiv 2505.23416, section 3.

    The score is the most attention that a token gets from any query while the text is given a second time, after a
    request to repeat it, so it does not depend on a question. The host runs the second pass within
    `PiKVCache.rehearsal`; until then nothing leaves, and the prompt takes its whole memory. The softmax is over all
    that is stored and what has been repeated; the authors' is over the sinks, the part that is being repeated and the
    repetition, part by part.
    """

    sinks: int = attrs.field(default=4, validator=at_least(0))
    recent: int = attrs.field(default=32, validator=at_least(0))

    def fold(self, view: TokenView) -> Tensor:
        """The greater of what was remembered and what the view's queries give."""
        assert view.attended is not None  # core shows it
        return view.attended.maximum(view.peak())

    def score(self, view: TokenView) -> Tensor:
        """The greatest attention: [sequences, kv_heads, tokens]."""
        assert view.attended is not None  # core shows it
        return view.attended

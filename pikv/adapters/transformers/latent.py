"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): attend to latents, never expanded."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen(kw_only=True)
class LatentKV:
    """One KV head whose key is [latent, rotated part] and whose value is the latent.

    The matrices that would expand a latent to each head's key and value act on the query and on the output instead.
    """

    rank: int
    key_part: int
    """Channels of a head's key that come from the latent."""
    rotated_part: int
    """Channels of a key that are rotated, the same for all heads."""

    def keys(self, latents: Tensor, rotated: Tensor) -> Tensor:
        """Keys [batch, 1, tokens, rank + rotated channels], whose first `rank` channels are the values."""
        return torch.cat([latents, rotated], dim=-1)

    def enter(self, module: Any, query: Tensor) -> Tensor:
        """Query [batch, heads, tokens, key_part + rotated] to [batch, heads, tokens, rank + rotated]."""
        expand = self._expand(module)[:, : self.key_part]  # [heads, key_part, rank]
        plain, rotated = query.split([self.key_part, self.rotated_part], dim=-1)
        return torch.cat([plain @ expand, rotated], dim=-1)

    def leave(self, module: Any, output: Tensor) -> Tensor:
        """Output [batch, heads, tokens, rank] to [batch, heads, tokens, value_dim]."""
        return output @ self._expand(module)[:, self.key_part :].mT

    def _expand(self, module: Any) -> Tensor:
        """The matrices that expand latents, [heads, key_part + value_dim, rank]."""
        weight: Tensor = module.kv_b_proj.weight.detach()
        return weight.unflatten(0, (module.num_heads, -1))


def latent_kv(attention: Any) -> LatentKV | None:
    """How this attention module expands latents, if they are what it caches; None if it caches heads."""
    if not hasattr(attention, "expand_kv"):
        return None
    return LatentKV(
        rank=attention.kv_lora_rank, key_part=attention.qk_nope_head_dim, rotated_part=attention.qk_rope_head_dim
    )

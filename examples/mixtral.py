"""A Mixtral decoder in plain torch that keeps its keys and values in somebody else's cache.

It reads any folder in Mixtral's format (config.json and safetensors) and computes in float32. Under several ranks
expert e lives at rank e % ranks: tokens are dispatched to the experts' ranks and their outputs combined at home.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import attrs
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pikv import InputError, Rotary
from pikv.core.ports import Observation, Router, RouterState, Transport
from pikv.policies import TopK


class Cache(Protocol):
    """What the decoder needs of a cache; `pikv.PiKVCache` has it, and so has `DenseCache`."""

    def update(self, layer_id: int, token_id: int, k: Tensor, v: Tensor) -> None:
        """Store k, v [batch, kv_heads, tokens, head_dim], the first of them at position `token_id`."""

    def attend(self, layer_id: int, q: Tensor) -> Tensor:
        """Return the attention of q [batch, query_heads, tokens, head_dim], the newest tokens, in q's shape."""


@attrs.frozen(kw_only=True)
class MixtralConfig:
    """What the decoder reads of config.json."""

    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    norm_eps: float
    rotary: Rotary
    window: int | None
    end_ids: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read config.json in `folder`; InputError if it is missing or describes another kind of model."""
        file = folder / "config.json"
        if not file.is_file():
            raise InputError(f"a model is a folder with config.json, {folder} has none; check the path")
        try:
            return cls._of(json.loads(file.read_text("utf-8")), file)
        except (json.JSONDecodeError, KeyError) as error:
            raise InputError(f"{file} does not describe a Mixtral: {error!r}; was it copied whole?") from error

    @classmethod
    def _of(cls, found: dict[str, Any], file: Path) -> Self:
        if found.get("model_type") != "mixtral":
            raise InputError(f"model_type must be 'mixtral', {file} says {found.get('model_type')!r}")
        rope = found.get("rope_parameters") or found.get("rope_scaling") or {}  # the former since transformers 5
        if (kind := rope.get("rope_type") or rope.get("type") or "default") != "default":
            raise InputError(f"rope_type must be 'default', {file} says {kind!r}")
        heads, hidden = found["num_attention_heads"], found["hidden_size"]
        head_dim = found.get("head_dim") or hidden // heads
        end = found.get("eos_token_id")
        return cls(
            layers=found["num_hidden_layers"],
            hidden=hidden,
            intermediate=found["intermediate_size"],
            query_heads=heads,
            kv_heads=found.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            experts=found["num_local_experts"],
            experts_per_token=found["num_experts_per_tok"],
            norm_eps=found["rms_norm_eps"],
            rotary=Rotary.of(dim=head_dim, theta=rope.get("rope_theta") or found.get("rope_theta") or 1e6),
            window=found.get("sliding_window"),
            end_ids=tuple(end) if isinstance(end, list) else (end,) if end is not None else (),
        )


def load_weights(folder: Path, wanted: set[str]) -> dict[str, Tensor]:
    """Read the `wanted` tensors that there are, from one safetensors file or from the shards of an index."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    weights: dict[str, Tensor] = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise InputError(f"the model's weights must be in {folder / name}, which is missing; copy the whole folder")
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                weights |= {key: tensors.get_tensor(key).float() for key in wanted & set(tensors.keys())}
        except SafetensorError as error:
            raise InputError(f"{folder / name} cannot be read: {error}; was it copied whole?") from error
    return weights


class Mixtral:
    """The decoder. All ranks call `step` with the same tokens and get the same logits.

    routed: is told a layer's number and its gate's probabilities [batch, tokens, experts], on every rank, once the
    layer has attended. slow_s: a model of a slow rank, whose experts take so much longer for each token. computed and
    compute_s: the tokens that this rank's experts have computed, and the time that they took.
    """

    def __init__(
        self,
        folder: Path,
        transport: Transport,
        router: Router | None = None,
        routed: Callable[[int, Tensor], object] | None = None,
        slow_s: float = 0.0,
    ) -> None:
        self.config = MixtralConfig.read(folder)
        self.transport, self._routed, self._slow_s = transport, routed, slow_s
        self.computed, self.compute_s = 0, 0.0
        self.router = TopK() if router is None else router
        places = torch.arange(self.config.experts) % transport.size
        self._routing = [self.router.start(self.config.experts, places) for _ in range(self.config.layers)]
        self.home_experts = range(transport.rank, self.config.experts, transport.size)
        self._weights = load_weights(folder, self._names() | {"lm_head.weight"})
        if missing := self._names() - set(self._weights):
            raise InputError(f"{folder} has no {min(missing)}, nor {len(missing) - 1} others; is it a whole Mixtral?")
        self._embedding = self._weights["model.embed_tokens.weight"]
        self._head = self._weights.get("lm_head.weight", self._embedding)  # absent when tied

    def _names(self) -> set[str]:
        """The names of the weights that this rank needs."""
        attention = [f"self_attn.{name}_proj" for name in "qkvo"]
        norms = ["input_layernorm", "post_attention_layernorm"]
        experts = [f"block_sparse_moe.experts.{expert}.w{i}" for expert in self.home_experts for i in (1, 2, 3)]
        parts = [*attention, *norms, *experts, "block_sparse_moe.gate"]
        layers = {f"model.layers.{layer}.{part}.weight" for layer in range(self.config.layers) for part in parts}
        return layers | {"model.embed_tokens.weight", "model.norm.weight"}

    def expert_bytes(self) -> int:
        """The bytes of all expert weights that this rank holds, read from their storages."""
        experts = (tensor for name, tensor in self._weights.items() if ".experts." in name)
        return sum(tensor.untyped_storage().nbytes() for tensor in experts)

    @torch.no_grad()
    def step(self, token_ids: Tensor, position: int, cache: Cache) -> Tensor:
        """Run token_ids int64 [batch, tokens] from `position` on; return the last one's logits [batch, vocabulary]."""
        return self._logits(self._hidden(token_ids, position, cache)[:, -1])

    @torch.no_grad()
    def predict(self, token_ids: Tensor, position: int, cache: Cache) -> Tensor:
        """The same, with the logits of every token: [batch, tokens, vocabulary]."""
        return self._logits(self._hidden(token_ids, position, cache))

    def _hidden(self, token_ids: Tensor, position: int, cache: Cache) -> Tensor:
        hidden = self._embedding[token_ids]  # [batch, tokens, hidden]
        positions = torch.arange(position, position + token_ids.shape[1])
        for layer in range(self.config.layers):
            hidden = hidden + self._attention(layer, self._norm(layer, "input_layernorm", hidden), positions, cache)
            normed = self._norm(layer, "post_attention_layernorm", hidden)
            if self._routed is not None:
                self._routed(layer, self._gate(layer, normed))
            hidden = hidden + self._experts(layer, normed)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden, hidden.shape[-1:], self._weights["model.norm.weight"], self.config.norm_eps)
        return F.linear(normed, self._head)

    def _weight(self, layer: int, name: str) -> Tensor:
        return self._weights[f"model.layers.{layer}.{name}.weight"]

    def _norm(self, layer: int, name: str, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self._weight(layer, name), self.config.norm_eps)

    def _attention(self, layer: int, hidden: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        def heads(name: str) -> Tensor:  # [batch, heads, tokens, head_dim]
            projected = F.linear(hidden, self._weight(layer, f"self_attn.{name}"))
            return projected.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        rotate = self.config.rotary.apply
        cache.update(layer, int(positions[0]), rotate(heads("k_proj"), positions), heads("v_proj"))
        attended = cache.attend(layer, rotate(heads("q_proj"), positions))
        return F.linear(attended.transpose(1, 2).flatten(2), self._weight(layer, "self_attn.o_proj"))

    def _gate(self, layer: int, hidden: Tensor) -> Tensor:
        """The probabilities of the experts, [..., experts]."""
        return F.softmax(F.linear(hidden, self._weight(layer, "block_sparse_moe.gate")), dim=-1)

    def _experts(self, layer: int, hidden: Tensor) -> Tensor:
        """Token t is routed by rank t % size, computed where its experts live, and gathered by all."""
        rank, size = self.transport.rank, self.transport.size
        tokens = hidden.flatten(0, 1)  # [tokens, hidden]
        mine = tokens[rank::size]
        routing = self.router.route(self._routing[layer], self._gate(layer, mine), self.config.experts_per_token)
        experts = routing.experts  # [mine, k]

        outputs = self._dispatch(layer, mine.repeat_interleave(experts.shape[1], 0), experts.flatten())
        combined = (outputs.unflatten(0, experts.shape) * routing.weights[..., None]).sum(1)

        share = -(-len(tokens) // size)  # the most tokens a rank has; all_gather needs the same of all
        everyone = self.transport.all_gather(F.pad(combined, (0, 0, 0, share - len(combined))))  # [size, share, hidden]
        return everyone.transpose(0, 1).flatten(0, 1)[: len(tokens)].view_as(hidden)

    def _dispatch(self, layer: int, states: Tensor, experts: Tensor) -> Tensor:
        """Send states [n, hidden] to the ranks of experts [n]; return the experts' outputs [n, hidden]."""
        size = self.transport.size
        order = (experts % size).argsort(stable=True)
        rows = (experts % size).bincount(minlength=size).tolist()
        labelled = torch.cat([states, experts[:, None].float()], dim=1)  # one exchange instead of two
        arrived = self.transport.all_to_all(labelled[order].split(rows))
        inputs, numbers = torch.cat(arrived).split([states.shape[1], 1], dim=1)

        outputs, started = torch.empty_like(inputs), time.perf_counter()
        for expert in self.home_experts:
            chosen = (numbers[:, 0] == expert).nonzero()[:, 0]
            outputs[chosen] = self._run_expert(layer, expert, inputs[chosen])
        if self._slow_s:
            time.sleep(self._slow_s * len(inputs))  # --slow-rank, a model of one
        seconds = time.perf_counter() - started
        self.computed, self.compute_s = self.computed + len(inputs), self.compute_s + seconds
        self._observe(layer, tokens=len(inputs), seconds=seconds)
        back = self.transport.all_to_all(outputs.split([len(part) for part in arrived]))
        return torch.empty_like(states).index_copy_(0, order, torch.cat(back))

    def _observe(self, layer: int, *, tokens: int, seconds: float) -> None:
        """Tell a router that learns what this step cost each rank."""
        state = self._routing[layer]
        if type(state) is RouterState:  # it remembers nothing, so the ranks need not exchange what they measured
            return
        costs = self.transport.all_gather(torch.tensor([tokens, seconds], dtype=torch.float64))
        seen = Observation(tokens=costs[:, 0].long(), seconds=costs[:, 1])
        self._routing[layer] = self.router.observe(state, seen)

    def _run_expert(self, layer: int, expert: int, states: Tensor) -> Tensor:
        w1, w2, w3 = (self._weight(layer, f"block_sparse_moe.experts.{expert}.w{i}") for i in (1, 2, 3))
        return F.linear(F.silu(F.linear(states, w1)) * F.linear(states, w3), w2)


class DenseCache:
    """The reference: one tensor of all keys and one of all values for each layer, attended by torch SDPA."""

    def __init__(self, config: MixtralConfig) -> None:
        self._window = config.window
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer_id: int, token_id: int, k: Tensor, v: Tensor) -> None:
        """Append k, v [batch, kv_heads, tokens, head_dim] behind the `token_id` tokens that are there."""
        keys, values = self._layers.get(layer_id, (k[:, :, :0], v[:, :, :0]))
        assert keys.shape[2] == token_id, f"layer {layer_id} has {keys.shape[2]} tokens, not {token_id}"
        self._layers[layer_id] = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

    def attend(self, layer_id: int, q: Tensor) -> Tensor:
        """Attend causally, within the window if there is one; q and result [batch, query_heads, tokens, head_dim]."""
        keys, values = self._layers[layer_id]
        ago = torch.arange(keys.shape[2] - q.shape[2], keys.shape[2])[:, None] - torch.arange(keys.shape[2])
        seen = (ago >= 0) & (ago < (self._window or keys.shape[2]))  # [tokens, all tokens]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)

    def stored_bytes(self) -> int:
        """The bytes of all keys and values."""
        return sum(tensor.untyped_storage().nbytes() for layer in self._layers.values() for tensor in layer)

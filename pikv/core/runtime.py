"""How a cache is composed; checked when constructed."""

from __future__ import annotations

import attrs

from pikv.core.config import ModelConfig
from pikv.core.errors import ConfigError
from pikv.core.exact import Exact, KeepAll, LeastRecentlyRead, Refuse
from pikv.core.fetching import FetchIfFaster
from pikv.core.forms import PageForm
from pikv.core.overlap import Overlap
from pikv.core.ports import (
    Allocator,
    AttendedTokenSelector,
    Backend,
    BoundedAllocator,
    Compressor,
    Demotion,
    Fetching,
    FullPool,
    HeadSharding,
    MemoryTier,
    NeedsRotary,
    PagePredictor,
    PageSelector,
    PrefixStore,
    QueryTokenSelector,
    Router,
    ScoreAllocator,
    SecondPassSelector,
    Sharding,
    SharingTokenSelector,
    Streamer,
    TokenSelector,
    Transport,
)
from pikv.core.torch_backend import TorchBackend
from pikv.core.validators import compressors, is_a, one_or_many, optional_positive, positive

PAGE_SIZES = (16, 32, 64)


@attrs.frozen(kw_only=True)
class RuntimeConfig:
    """How a cache is composed. Every default is exact, in memory, and needs torch alone.

    compressor: the page format of all layers, or a sequence of them, one for each layer. page_size: tokens that a
    sealed page holds. tail_tokens: the newest tokens of a row that stay exact. budget_tokens:
    the mean number of tokens that a layer and KV head may keep, sinks and tail included, on all ranks together; None
    keeps everything.
    backends: asked in this order for a kernel, once a layer. transport and sharding: where tokens are stored when
    several ranks decode together. streamer: where `commit` puts versions. tiers: where pages go that do not fit near,
    the fastest first, with room for every page that the pool takes; demotion says which go, predictor which the next
    layer will choose, so that they are fetched ahead; overlap during whose collectives that begins, by default at once.
    prefix_store: where pages of prompts are kept for those of other processes that begin alike; fetching says when they
    are worth it. Streamer, tiers, transport and prefix_store stay their maker's to close.
    """

    compressor: Compressor | tuple[Compressor, ...] = attrs.field(
        factory=Exact, converter=one_or_many, validator=compressors
    )
    token_selector: TokenSelector = attrs.field(factory=KeepAll, validator=is_a(TokenSelector))
    page_selector: PageSelector | None = attrs.field(default=None, validator=is_a(PageSelector))
    allocator: Allocator | None = attrs.field(default=None, validator=is_a(Allocator))
    budget_tokens: int | None = attrs.field(default=None, validator=optional_positive)
    router: Router | None = attrs.field(default=None, validator=is_a(Router))
    page_size: int = 64
    tail_tokens: int = attrs.field(default=128, validator=positive)
    when_full: FullPool = attrs.field(factory=Refuse, validator=is_a(FullPool))
    backends: tuple[Backend, ...] = attrs.field(default=(TorchBackend(),), converter=tuple)
    transport: Transport | None = attrs.field(default=None, validator=is_a(Transport))
    sharding: Sharding | None = attrs.field(default=None, validator=is_a(Sharding))
    streamer: Streamer | None = attrs.field(default=None, validator=is_a(Streamer))
    tiers: tuple[MemoryTier, ...] = attrs.field(default=(), converter=tuple)
    demotion: Demotion = attrs.field(factory=LeastRecentlyRead, validator=is_a(Demotion))
    predictor: PagePredictor | None = attrs.field(default=None, validator=is_a(PagePredictor))
    overlap: Overlap | None = attrs.field(default=None, validator=is_a(Overlap))
    prefix_store: PrefixStore | None = attrs.field(default=None, validator=is_a(PrefixStore))
    fetching: Fetching = attrs.field(factory=FetchIfFaster, validator=is_a(Fetching))

    def __attrs_post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise ConfigError(f"page_size must be one of {PAGE_SIZES}, got {self.page_size!r}")
        if not self.backends:
            raise ConfigError("backends must not be empty; the torch backend serves every composition")
        if (self.transport is None) != (self.sharding is None):
            given, missing = ("transport", "sharding") if self.sharding is None else ("sharding", "transport")
            raise ConfigError(f"{given} was given without {missing}; several ranks need both, one rank neither")
        if self.predictor is not None and not self.tiers:
            raise ConfigError("predictor needs tiers to fetch from; add some or leave it out")
        self._check_budget()

    def _check_budget(self) -> None:
        keeps_all = isinstance(self.token_selector, KeepAll)
        if self.budget_tokens is None:
            if not keeps_all or self.allocator is not None:
                part = self.allocator if keeps_all else self.token_selector
                raise ConfigError(
                    f"{type(part).__name__} needs a budget_tokens to keep to; give one, or leave the part out"
                )
            return
        if keeps_all:
            raise ConfigError(
                f"budget_tokens={self.budget_tokens} needs a token_selector that says what leaves; "
                "the nearest is Recent(), sinks and a recent window"
            )
        if self.allocator is None:
            raise ConfigError("budget_tokens needs an allocator; the nearest is Uniform(), the same for all layers")
        if self.remembers not in (None, self.split_by) and isinstance(self.split_by, AttendedTokenSelector):
            raise ConfigError(
                f"{type(self.token_selector).__name__} and {type(self.split_by).__name__} both remember attention, in "
                "different ways; split by the scores of one that does not, or leave scored_by out"
            )
        selector = self.token_selector
        if self.tail_tokens < selector.recent:
            raise ConfigError(
                f"tail_tokens must be >= recent = {selector.recent} of {type(selector).__name__}, since the recent "
                f"window lives in the tail, got {self.tail_tokens}; raise it or lower recent"
            )
        self.check_budget(1 if isinstance(self.sharding, HeadSharding) else self.places)

    def check_budget(self, sharing: int) -> None:
        """Raise ConfigError if a budget is too little for so many ranks that divide a head's tokens."""
        sinks = -(-self.token_selector.sinks // self.page_size) * self.page_size
        least = self.tail_tokens + sinks
        if self.budget_tokens is not None and self.budget_tokens < least * sharing:
            raise ConfigError(
                f"budget_tokens must be >= ranks * (tail_tokens + the pages that hold the sinks) = {sharing} * "
                f"{least}, got {self.budget_tokens}; raise it or lower tail_tokens"
            )

    @property
    def places(self) -> int:
        """How many ranks store tokens."""
        return 1 if self.transport is None else self.transport.size

    @property
    def split_by(self) -> TokenSelector | None:
        """Whose scores split a layer's budget among its heads, if the allocator follows others than the selector's."""
        return self.allocator.scored_by if isinstance(self.allocator, ScoreAllocator) else None

    @property
    def query_window(self) -> int | None:
        """How many of the newest queries are kept for those who score tokens; None if no one looks at them."""
        return _widest(self.token_selector, self.split_by)

    def query_window_of(self, layer_id: int) -> int | None:
        """The same in one layer: where it follows another, its token selector does not look."""
        follows = self.leader_of(layer_id) != layer_id
        return _widest(None if follows else self.token_selector, self.split_by)

    def leader_of(self, layer_id: int) -> int:
        """The layer whose tokens a layer keeps: itself unless the token selector says otherwise."""
        selector = self.token_selector
        return selector.leader(layer_id) if isinstance(selector, SharingTokenSelector) else layer_id

    def shares_layers(self, model: ModelConfig) -> bool:
        """Whether some layer keeps what another keeps."""
        return any(self.leader_of(layer_id) != layer_id for layer_id in range(len(model.layers)))

    @property
    def remembers(self) -> AttendedTokenSelector | None:
        """Who folds attention into what it remembers of tokens, if anybody does."""
        parts = (self.token_selector, self.split_by)
        return next((part for part in parts if isinstance(part, AttendedTokenSelector)), None)

    def check_serves(self, model: ModelConfig) -> None:
        """Raise ConfigError if a part needs what the model does not say of itself, or cannot work with it."""
        windows = [layer_id for layer_id, layer in enumerate(model.layers) if layer.window is not None]
        if isinstance(self.remembers, SecondPassSelector) and windows:
            raise ConfigError(
                f"layer {windows[0]} has a sliding window, so {type(self.remembers).__name__} cannot go over the text "
                "again: its beginning has left; compose another token selector"
            )
        self._check_bounds(model)
        self._check_leaders(model)
        for layer_id, layer in enumerate(model.layers):
            parts = (self.token_selector, self.split_by, self.compressor_of(model, layer_id))
            needy = next((part for part in parts if isinstance(part, NeedsRotary)), None)
            if needy is not None and layer.rotary is None:
                raise ConfigError(
                    f"layer {layer_id} has no rotary (it is not known, or depends on the length of the text), which "
                    f"{type(needy).__name__} needs to un-rotate keys; give LayerConfig a rotary, or compose another "
                    "part"
                )

    def _check_leaders(self, model: ModelConfig) -> None:
        """Raise ConfigError if a layer follows one that does not come before it, or has other rows."""
        for layer_id, layer in enumerate(model.layers):
            leader, name = self.leader_of(layer_id), type(self.token_selector).__name__
            if not 0 <= leader <= layer_id or self.leader_of(leader) != leader:
                raise ConfigError(
                    f"{name}: layer {layer_id} must follow itself or an earlier layer that follows no other, got layer "
                    f"{leader}; mend its leader()"
                )
            if model.layers[leader].kv_heads != layer.kv_heads:
                raise ConfigError(
                    f"{name}: layer {layer_id} has {layer.kv_heads} KV heads and cannot keep the tokens of layer "
                    f"{leader}, which has {model.layers[leader].kv_heads}; let each layer choose for itself"
                )

    def _check_bounds(self, model: ModelConfig) -> None:
        """Raise ConfigError if an allocator's bounds are for other rows, or have no room for the sinks."""
        if not isinstance(self.allocator, BoundedAllocator):
            return
        name, most = type(self.allocator).__name__, self.allocator.most
        heads, bounded = [layer.kv_heads for layer in model.layers], [len(layer) for layer in most]
        if heads != bounded:
            raise ConfigError(
                f"{name} must bound the KV heads of each layer, {heads}, got bounds for {bounded}; make it for this "
                "model"
            )
        least = -(-self.token_selector.sinks // self.page_size)
        if min(map(min, most)) < least:
            raise ConfigError(
                f"{name} must leave each row the {least} pages that hold the {self.token_selector.sinks} sinks of "
                f"{type(self.token_selector).__name__}, got {most}; raise the bounds or lower sinks"
            )

    def compressor_of(self, model: ModelConfig, layer_id: int) -> Compressor:
        """What writes a layer's pages. Raises ConfigError where the model has another number of layers."""
        if isinstance(self.compressor, Compressor):
            return self.compressor
        if len(self.compressor) != len(model.layers):
            raise ConfigError(
                f"compressor must be one for all layers, or one for each of {len(model.layers)}, got "
                f"{len(self.compressor)} of them; name one for every layer"
            )
        return self.compressor[layer_id]

    def form(self, model: ModelConfig, layer_id: int) -> PageForm:
        """The layout of a layer's pages. Raises ConfigError where the model has another number of layers."""
        compressor = self.compressor_of(model, layer_id)
        return compressor.form(model.layers[layer_id], page_size=self.page_size, dtype=model.dtype)

    def forms(self, model: ModelConfig) -> list[PageForm]:
        """The layouts of all layers' pages; see `form`."""
        return [self.form(model, layer_id) for layer_id in range(len(model.layers))]


def _widest(*parts: TokenSelector | None) -> int | None:
    """The widest window of queries that any of the parts looks at; None if none does."""
    return max((part.window for part in parts if isinstance(part, QueryTokenSelector)), default=None)

"""Settings are checked when they are made: ConfigError, a ValueError, says what was expected and what came."""

from __future__ import annotations

import attrs
import pytest
import torch

import pikv
from pikv.core.exact import Exact
from pikv.core.forms import PageForm
from pikv.core.ports import Backend
from pikv.policies import EvictOldest, Quest, Recent, TokenRange, Uniform
from pikv.testing.transport import FakeTransport

LAYER = {"query_heads": 4, "kv_heads": 2, "key_dim": 8, "value_dim": 8}
MODEL = {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 8}
BUDGETED = {"token_selector": Recent(), "allocator": Uniform(), "budget_tokens": 256}
TRANSPORT = FakeTransport.group(1)[0]


def check_refused(make, settings, parts):
    with pytest.raises(pikv.ConfigError) as raised:
        make(**settings)
    assert isinstance(raised.value, ValueError)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"query_heads": 0}, ["query_heads must be a positive whole number", "got 0"]),
        ({"kv_heads": 1.0}, ["kv_heads must be a positive whole number", "got 1.0"]),
        ({"key_dim": -1}, ["key_dim must be a positive whole number", "got -1"]),
        ({"value_dim": "8"}, ["value_dim must be a positive whole number", "got '8'"]),
        ({"window": 0}, ["window must be a positive whole number", "got 0"]),
        ({"kv_heads": 3}, ["query_heads must be a multiple of kv_heads", "got 4 and 3"]),
        ({"scale": 0.0}, ["scale must be a positive number", "got 0.0"]),
        ({"scale": float("nan")}, ["scale must be a positive number", "got nan"]),
        ({"softcap": 0.0}, ["softcap must be a positive number or None", "got 0.0"]),
        ({"softcap": float("inf")}, ["softcap must be a positive number or None", "got inf"]),
        ({"sinks": [0.0]}, ["sinks must have one logit for each of 4 query heads", "got 1"]),
        ({"values": "latent"}, ["values must be 'stored' or 'key_prefix'", "got 'latent'"]),
        ({"values": "key_prefix", "value_dim": 9}, ["value_dim must be at most key_dim = 8", "got 9"]),
    ],
)
def test_a_layer_is_checked(settings, parts):
    """Sizes, numbers and their combinations."""
    check_refused(pikv.LayerConfig, LAYER | settings, parts)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"layers": 0}, ["layers must be a positive whole number", "got 0", "ModelConfig.of"]),
        ({"layers": [1]}, ["layers must be a positive whole number", "got [1]", "ModelConfig.of"]),
        ({"dtype": torch.float64}, ["dtype must be one of torch.float32, torch.bfloat16, torch.float16", "float64"]),
        ({"experts": 8}, ["experts and experts_per_token go together", "got 8 and None"]),
        ({"experts": 8, "experts_per_token": 9}, ["experts_per_token must be between 1 and experts = 8", "got 9"]),
    ],
)
def test_a_model_is_checked(settings, parts):
    """Sizes, dtype and experts."""
    check_refused(pikv.ModelConfig, MODEL | settings, parts)


def test_a_model_has_layers():
    """A list must not be empty."""
    check_refused(pikv.ModelConfig.of, {"layers": []}, ["layers must not be empty"])


def test_a_uniform_model_is_a_model_of_equal_layers():
    """Both ways to write a model give equal ones."""
    model = pikv.ModelConfig(**MODEL, window=5, experts=8, experts_per_token=2)
    layers = [pikv.LayerConfig(**LAYER, window=5)] * 2
    assert model == pikv.ModelConfig.of(layers, experts=8, experts_per_token=2)
    assert model.layers[0].group == 2
    assert model.layers[0].scale == 8**-0.5


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"page_size": 48}, ["page_size must be one of (16, 32, 64)", "got 48"]),
        ({"tail_tokens": 0}, ["tail_tokens must be a positive whole number", "got 0"]),
        ({"budget_tokens": 0}, ["budget_tokens must be a positive whole number", "got 0"]),
        ({"backends": []}, ["backends must not be empty", "torch"]),
        ({"budget_tokens": 256}, ["budget_tokens=256 needs a token_selector", "the nearest is Recent()"]),
        ({"token_selector": Recent()}, ["Recent needs a budget_tokens", "leave the part out"]),
        ({"allocator": Uniform()}, ["Uniform needs a budget_tokens", "leave the part out"]),
        (BUDGETED | {"allocator": None}, ["budget_tokens needs an allocator", "the nearest is Uniform()"]),
        (
            BUDGETED | {"token_selector": Recent(recent=129)},
            ["tail_tokens must be >= recent = 129 of Recent", "got 128"],
        ),
        (BUDGETED | {"budget_tokens": 191}, ["budget_tokens must be >=", "= 1 * 192", "got 191", "lower tail_tokens"]),
        (BUDGETED | {"token_selector": Recent(sinks=65), "budget_tokens": 255}, ["= 1 * 256", "got 255"]),
        ({"transport": TRANSPORT}, ["transport was given without sharding"]),
        ({"sharding": TokenRange()}, ["sharding was given without transport"]),
    ],
)
def test_a_composition_that_cannot_work_is_refused(settings, parts):
    """With the reason, and the nearest one that can where there is one."""
    check_refused(pikv.RuntimeConfig, settings, parts)


def test_the_least_budget_is_the_tail_and_the_pages_of_the_sinks():
    """Without sinks the tail alone."""
    for sinks, least in [(0, 128), (1, 192), (64, 192), (65, 256)]:
        pikv.RuntimeConfig(**BUDGETED | {"token_selector": Recent(sinks=sinks), "budget_tokens": least})


def test_compose_refuses_as_a_runtime_does():
    """The check is the configuration's, wherever it is made."""
    model = pikv.ModelConfig(**MODEL)
    check_refused(pikv.compose, {"model": model, "budget_tokens": 256}, ["needs a token_selector", "Recent()"])


@pytest.mark.parametrize(
    "part", [Recent, Uniform, TokenRange, EvictOldest, Exact, pikv.LayerConfig, pikv.RuntimeConfig]
)
def test_settings_are_frozen(part):
    """Nothing can be set once it is made."""
    made = part(**LAYER) if part is pikv.LayerConfig else part()
    names = [field.name for field in attrs.fields(part)] or ["anything"]
    for name in names:
        with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
            setattr(made, name, None)


NAMES = {
    "token_selector": {"name": "recent", "sinks": 2},
    "budget_tokens": 192,
    "when_full": "evict_oldest",
    "compressor": None,
}


def test_names_become_objects():
    """A name, or a name with settings; None is left out; a budget is shared out equally where nothing else is said."""
    runtime = pikv.runtime_from(NAMES, pikv.ModelConfig(**MODEL))
    assert runtime.token_selector == Recent(sinks=2)
    assert runtime.allocator == Uniform()
    assert runtime.when_full == EvictOldest()
    assert runtime.compressor == Exact()
    assert runtime.budget_tokens == 192


def test_names_compose_what_objects_compose():
    """Also the parts that several ranks need."""
    names = {"shard_by": {"name": "token_range", "tokens": 8}, "page_size": 32}
    runtime = pikv.runtime_from(names, pikv.ModelConfig(**MODEL), transport=TRANSPORT)
    composed = pikv.compose(pikv.ModelConfig(**MODEL), sharding=TokenRange(tokens=8), transport=TRANSPORT, page_size=32)
    assert runtime == composed.runtime


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ({"compresor": "exact"}, ["key must be one of allocator,", "got 'compresor'", "did you mean 'compressor'?"]),
        ({"token_selector": "recnt"}, ["token_selector must be one of", "got 'recnt'", "did you mean 'recent'?"]),
        ({"compressor": "zzz"}, ["compressor must be one of", "exact", "got 'zzz'", "choose one of these"]),
        ({"compressor": {"bits": 4}}, ['compressor needs a "name"', "one of exact, fp8, int2"]),
        ({"compressor": 4}, ["compressor must be one of", "got 4"]),
    ],
)
def test_an_unknown_name_is_refused(names, parts):
    """UnknownNameError, a KeyError that prints without quotes, lists what there is and guesses what was meant."""
    with pytest.raises(pikv.UnknownNameError) as raised:
        pikv.runtime_from(names, pikv.ModelConfig(**MODEL))
    assert isinstance(raised.value, KeyError)
    assert isinstance(raised.value, pikv.PiKVError)
    for part in parts:
        assert part in str(raised.value)
    assert not str(raised.value).startswith(("'", '"'))


def test_a_setting_that_a_part_does_not_have_is_refused():
    """ConfigError names the part and the setting."""
    names = {"token_selector": {"name": "recent", "sink": 2}, "budget_tokens": 256}
    parts = ["token_selector 'recent' does not take {'sink': 2}", "it takes sinks, recent"]
    check_refused(pikv.runtime_from, {"names": names, "model": pikv.ModelConfig(**MODEL)}, parts)


class Nothing(Backend):
    """A backend without kernels."""

    @property
    def name(self):
        return "nothing"

    def attend(self, codec, device):
        return None

    def choose(self, selector, layer, device):
        return None

    def seal(self, codec, selector, device):
        return None


def test_backends_are_asked_in_order():
    """The first that has a kernel serves; describe tells which, for which layers, and what is composed."""
    torch_alone = pikv.RuntimeConfig().backends
    other = pikv.LayerConfig(**LAYER | {"value_dim": 4})
    layer = pikv.LayerConfig(**LAYER)
    model = pikv.ModelConfig.of([layer, layer, other, layer])
    cache = pikv.compose(model, backends=[Nothing(), *torch_alone], token_selector=Recent(), budget_tokens=192)
    described = cache.describe()
    assert set(described.steps) == {"attend, layers 0-1, 3", "attend, layers 2", "seal, layers 0-3"}
    assert all(text.startswith("torch") for text in described.steps.values())
    assert described.parts["token_selector"] == repr(Recent())
    assert described.parts["budget_tokens"] == "192"
    assert str(described).count("\n") == len(described.parts) + len(described.steps) - 1


def test_a_layer_that_no_backend_serves_is_refused():
    """ConfigError says which layer, which backends, and what to add."""
    settings = {"model": pikv.ModelConfig(**MODEL), "backends": [Nothing()]}
    check_refused(pikv.compose, settings, ["layer 0", "(nothing)", "attend Exact pages on cpu", "add TorchBackend()"])


def test_a_pool_must_be_of_the_model_and_the_runtime():
    """ConfigError where it has no pages of a layer's form, or lies on another device."""
    model = pikv.ModelConfig(**MODEL)
    pool = pikv.PagePool(model, pikv.RuntimeConfig(page_size=16))
    parts = ["pool", "build it from the same model and runtime"]
    check_refused(pikv.PiKVCache, {"model": model, "runtime": pikv.RuntimeConfig(), "pool": pool}, parts)
    elsewhere = pikv.ModelConfig(**MODEL, device="meta")
    pool = pikv.PagePool(elsewhere, pikv.RuntimeConfig(), capacity_bytes=2**20)
    check_refused(pikv.PiKVCache, {"model": model, "pool": pool}, ["pool must be on cpu like the model", "meta"])


def test_a_pool_must_keep_the_index_of_the_page_selector():
    """ConfigError where it was made for a runtime without one."""
    model, runtime = pikv.ModelConfig(**MODEL), pikv.RuntimeConfig(page_selector=Quest())
    settings = {"model": model, "runtime": runtime, "pool": pikv.PagePool(model, pikv.RuntimeConfig())}
    check_refused(pikv.PiKVCache, settings, ["pool: it keeps no index as Quest needs it", "same model and runtime"])


def test_a_pool_must_hold_a_page():
    """And one that takes its memory at once must be told how much."""
    model, runtime = pikv.ModelConfig(**MODEL), pikv.RuntimeConfig()
    stride = runtime.form(model, 0).stride
    settings = {"model": model, "runtime": runtime, "capacity_bytes": stride - 1}
    check_refused(pikv.PagePool, settings, [f"at least one page of {stride} bytes", f"got {stride - 1}"])
    settings = {"model": pikv.ModelConfig(**MODEL, device="meta"), "runtime": runtime}
    check_refused(pikv.PagePool, settings, ["capacity_bytes: a pool on meta must be told how much"])


def test_the_fields_of_a_page_do_not_overlap():
    """Each starts at a multiple of 64 bytes, and so does the next page."""
    model = pikv.ModelConfig.of([pikv.LayerConfig(**LAYER | {"key_dim": 3})], dtype=torch.bfloat16)
    form: PageForm = pikv.RuntimeConfig(page_size=16).form(model, 0)
    ends = [field.offset + field.nbytes for field in form.fields]
    starts = [field.offset for field in form.fields[1:]] + [form.stride]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    assert all(start % 64 == 0 for start in starts)
    pages = torch.arange(2 * form.stride, dtype=torch.int64).to(torch.uint8).view(2, form.stride)
    assert form.view(pages, "keys").shape == (2, 3, 16)
    assert form.view(pages, "positions").data_ptr() == pages.data_ptr() + form.fields[-1].offset

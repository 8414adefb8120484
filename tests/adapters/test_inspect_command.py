"""`pikv inspect` as a user types it: what it shows, what it finds, and what it says to mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from damage import flip

import pikv
from pikv.adapters.zarr_store import Inspection, ZarrStreamer
from pikv.cli.main import main

MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=16)


@pytest.fixture
def cache(tmp_path):
    """A cache of two sequences in a store of two versions, `store`."""
    runtime = pikv.RuntimeConfig(
        page_size=16, tail_tokens=16, streamer=ZarrStreamer(tmp_path / "store", segment_bytes=1 << 14)
    )
    cache = pikv.PiKVCache(MODEL, runtime)
    for start, tokens in ((0, 200), (200, 64)):
        for layer_id in range(2):
            generator = torch.Generator().manual_seed(start + layer_id)
            cache.update(layer_id, start, *torch.randn(2, 2, 2, tokens, 16, generator=generator))
            cache.finish_prefill()
        cache.commit()
    return cache


def inspected(capsys, *arguments):
    """The exit code and the versions, from JSON."""
    code = main(["inspect", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)["versions"]


def test_versions_layers_and_bytes(cache, tmp_path, capsys):
    """What is said is what the cache holds; nothing is changed."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, (first, second) = inspected(capsys, tmp_path / "store")
    assert code == 0
    assert (first["version"], second["version"]) == (1, 2)
    assert (second["sequences"], second["tokens"]) == (2, 264)
    assert second["page_bytes"] == cache.stored_bytes().pages == sum(layer["bytes"] for layer in second["layers"])
    assert second["pages"] == sum(layer["pages"] for layer in second["layers"])
    assert first["new_pages"] == first["pages"]
    assert second["new_pages"] == second["pages"] - first["pages"] > 0
    assert second["components"]["compressor"]["name"] == "Exact"
    assert second["damaged_pages"] == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_flipped_bit_is_named(cache, tmp_path, capsys):
    """By version, layer, sequence, KV head, page and tokens; the version without that page is good."""
    layer = cache._layers[1]
    page = layer.table.width - 1
    key = flip(tmp_path / "store", cache, 1, 0, 1, page)
    code, (first, second) = inspected(capsys, tmp_path / "store")
    assert code == 1
    assert first["damaged_pages"] == 0
    newest = layer.table.newest[0, 1].tolist()
    place = {"layer_id": 1, "sequence": 0, "kv_head": 1, "page": page, "key": key}
    assert second["lost"] == [place | {"first": newest[page - 1] + 1, "last": newest[page]}]
    assert main(["inspect", str(tmp_path / "store")]) == 1
    printed = capsys.readouterr()
    assert f"version 2: page {page} of layer 1, sequence 0, KV head 1" in printed.out
    assert "1 PAGES LOST" in printed.out
    assert "version 2" in printed.err  # the bar


def test_a_page_of_several_versions_is_read_once(cache, tmp_path, capsys):
    """And is lost in each of them."""
    store = tmp_path / "store"
    flip(store, cache, 0, 1, 0, 0)
    code, versions = inspected(capsys, store)
    assert code == 1
    assert [[(page["layer_id"], page["page"]) for page in each["lost"]] for each in versions] == [[(0, 0)]] * 2
    inspection, read = Inspection(store), list[int]()
    for version in inspection.versions():
        opened = inspection.open(version)
        unread = inspection.unread_bytes(opened)
        before = sum(read)
        inspection.damaged(opened, read.append)
        assert sum(read) - before == unread
        assert inspection.unread_bytes(opened) == 0
    assert sum(read) == cache.stored_bytes().pages


@pytest.mark.parametrize("part", ["manifests", "states", "segment"])
def test_what_is_not_a_page_is_checked_too(cache, tmp_path, capsys, part):
    """A document, a state by its name, and the keys of a segment, without which its pages are missing."""
    store = tmp_path / "store"
    if part == "manifests":
        path = store / "manifests/000000000001"
    elif part == "states":
        path = min((store / "states").rglob("0"), key=lambda each: each.stat().st_mtime_ns)
    else:
        path = min((store / "segments").glob("*/zarr.json"), key=lambda each: each.stat().st_mtime_ns)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    code, (first, second) = inspected(capsys, store)
    assert code == 1
    if part == "segment":
        assert first["lost"]
        assert second["damaged_pages"] == first["damaged_pages"]
        return
    assert {"manifests": "the manifest of version 1", "states": "version 1: state '"}[part] in first["damage"]
    assert second["damaged_pages"] == 0
    assert main(["inspect", str(store)]) == 1
    assert "DAMAGED" in capsys.readouterr().out


def test_many_losses_are_cut_short(cache, tmp_path, capsys):
    """The text names some, JSON all."""
    for path in (tmp_path / "store" / "segments").rglob("0.0"):
        path.unlink()
    assert main(["inspect", str(tmp_path / "store"), "--version", "2"]) == 1
    assert "more; --json has all" in capsys.readouterr().out
    _, (second,) = inspected(capsys, tmp_path / "store", "--version", "2")
    assert len(second["lost"]) == second["pages"]


def test_a_list_reads_no_page(cache, tmp_path, capsys):
    """Not even one that is gone; one version may be asked for."""
    for path in (tmp_path / "store" / "segments").rglob("0.0"):
        path.unlink()
    assert main(["inspect", str(tmp_path / "store"), "--list", "--version", "1"]) == 0
    printed = capsys.readouterr()
    assert "not read" in printed.out
    assert "1 version\n" in printed.out
    assert "compressor Exact" in printed.out
    assert not printed.err


def test_a_url_is_a_store_too(cache, tmp_path, capsys):
    """As obstore knows it."""
    code, versions = inspected(capsys, f"file://{tmp_path}/store")
    assert code == 0
    assert len(versions) == 2


def test_a_store_without_versions(tmp_path, capsys):
    """Is good."""
    ZarrStreamer(tmp_path).close()
    assert main(["inspect", str(tmp_path)]) == 0
    assert "0 versions" in capsys.readouterr().out


MISTAKES = {
    "no such folder": (["{}/none"], "holds no PiKV store"),
    "another folder": (["{}"], "holds no PiKV store"),
    "an empty place": (["memory:///"], "holds no PiKV store"),
    "no such URL": (["gopher://x"], "is no URL of a store"),
    "no such version": (["{}/store", "--version", "3"], "has no version 3, it has: 1, 2"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(cache, tmp_path, capsys, arguments, said):
    """Exit code 2, and nothing is made."""
    before = sorted(tmp_path.rglob("*"))
    assert main(["inspect", *(each.format(tmp_path) for each in arguments)]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_help_shows_examples(capsys):
    """And the exit codes."""
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    printed = capsys.readouterr().out
    assert "pikv inspect s3://bucket/checkpoints --json" in printed
    assert "Exit codes" in printed

"""The example that computes a prompt in one process and answers it in another."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers", reason="no transformers: pip install pikv[transformers]")

import disaggregated
from s3_server import make_bucket, serving


def run(monkeypatch, capsys, *arguments):
    """What it prints; it raises unless two processes say what one says."""
    short = ["--prompt-tokens", "400", "--answer-tokens", "3", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["disaggregated.py", *short, *arguments])
    disaggregated.main()
    return capsys.readouterr().out


def check(printed):
    """All layers were needed, sealed and read; the shares are said."""
    assert "1 prompts of 400 tokens; two processes say what one says" in printed
    for layer in range(4):
        for what in (f"layer {layer} is sealed", f"layer {layer} is needed", f"layer {layer} is here"):
            assert what in printed
    assert "s in one process" in printed
    assert "are hidden" in printed


def test_through_a_folder(monkeypatch, capsys):
    """The processes share nothing else."""
    check(run(monkeypatch, capsys))


@pytest.mark.slow  # two more interpreters that import and compile everything
def test_through_a_bucket(monkeypatch, capsys):
    """Of a server on this machine."""
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    with serving() as endpoint:
        make_bucket(endpoint, "prefixes")
        check(run(monkeypatch, capsys, "--endpoint", endpoint))


def test_too_little_to_share_is_refused(monkeypatch, capsys):
    """With the option that is too small."""
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "--prompt-tokens", "200")
    assert "--prompt-tokens must be 300 or more" in capsys.readouterr().err

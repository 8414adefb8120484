"""The example of a decode that is killed."""

from __future__ import annotations

import re
import sys

import pytest

pytest.importorskip("transformers", reason="no transformers: pip install pikv[transformers]")
pytest.importorskip("zarr", reason="no zarr: pip install pikv[zarr]")

import killed_decode


def test_the_tokens_are_the_same(monkeypatch, capsys):
    """It kills a process and checks that another goes on from a commit with the tokens of an undisturbed decode."""
    monkeypatch.setattr(sys, "argv", ["killed_decode.py", "--tokens", "96", "--commit-every", "24"])
    with pytest.raises(SystemExit) as ended:
        killed_decode.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    first, restored = (int(each) for each in re.findall(r"process begins with (\d+) tokens", printed))
    committed = [int(each) for each in re.findall(r"it has committed (\d+) tokens", printed)]
    assert "and is killed" in printed
    assert restored >= committed[-1] - 1 > first
    assert f"{first + 96} of {first + 96} tokens are those of an undisturbed decode" in printed


def test_too_few_commits_are_refused(monkeypatch, capsys):
    """There would be nothing to go on from."""
    monkeypatch.setattr(sys, "argv", ["killed_decode.py", "--tokens", "30", "--commit-every", "10"])
    with pytest.raises(SystemExit):
        killed_decode.main()
    assert "--commit-every" in capsys.readouterr().err

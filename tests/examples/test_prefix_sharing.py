"""The example that asks many questions to one document."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers", reason="no transformers: pip install pikv[transformers]")

import prefix_sharing


def test_a_document_is_stored_once(monkeypatch, capsys):
    """It checks that the answers are the same, and prints how much less is computed and stored."""
    monkeypatch.setattr(sys, "argv", ["prefix_sharing.py", "--document-tokens", "600", "--questions", "3"])
    prefix_sharing.main()
    printed = capsys.readouterr().out
    assert "3 questions to 600 tokens; the logits are the same to 1e-4" in printed
    assert "MB shared (" in printed


@pytest.mark.parametrize("arguments", [["--document-tokens", "0"], ["--questions", "1"], ["--alone", "0"]])
def test_too_little_to_compare_is_refused(monkeypatch, capsys, arguments):
    """With the option that is too small."""
    monkeypatch.setattr(sys, "argv", ["prefix_sharing.py", *arguments])
    with pytest.raises(SystemExit):
        prefix_sharing.main()
    assert arguments[0] in capsys.readouterr().err

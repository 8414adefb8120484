"""The example of a cache that is larger than its memory."""

from __future__ import annotations

import re
import sys

import pytest

pytest.importorskip("transformers", reason="no transformers: pip install pikv[transformers]")

import larger_than_memory


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["larger_than_memory.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        larger_than_memory.main()
    return ended.value.code


def test_the_tokens_are_the_same(monkeypatch, capsys):
    """Half of the pages are far, some are fetched ahead, and that is what is printed."""
    assert run(monkeypatch, "--prompt-tokens", "1000", "--tokens", "20", "--pages", "8") == 0
    printed = capsys.readouterr().out
    whole, near = (float(each) for each in re.match(r"(.*) MiB of pages, (.*) MiB may lie near", printed).groups())
    assert whole == pytest.approx(2 * near, rel=0.1)
    assert int(re.search(r"FileTier: .* (\d+) read,", printed).group(1)) > 0
    assert int(re.search(r"foreseen: (\d+)%", printed).group(1)) > 0
    assert "hidden: " in printed
    assert "20 of 20 tokens are those of a cache that is all near" in printed


@pytest.mark.parametrize("arguments", [["--prompt-tokens", "900"], ["--tokens", "1"], ["--tokens", "400"]])
def test_other_sizes_are_refused(monkeypatch, capsys, arguments):
    """With the option."""
    assert run(monkeypatch, *arguments) == 2
    assert arguments[0] in capsys.readouterr().err

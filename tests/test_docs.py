"""The code in the README and the docs runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pikv.compose import PARTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All Python blocks of a page run one after another, as a reader would type them."""
    names: dict[str, object] = {"__name__": "docs"}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link leads to a file of the project."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_found(page: Path) -> None:
    """Every page of docs/ stands in the site's navigation, and is linked from its first page."""
    name = str(page.relative_to(ROOT / "docs"))
    assert f": {name}\n" in (ROOT / "mkdocs.yml").read_text(), f"mkdocs.yml lacks {name}"
    assert name == "index.md" or f"]({name})" in (ROOT / "docs" / "index.md").read_text(), f"docs/index.md lacks {name}"


def test_the_reference_is_whole() -> None:
    """Every package that lists public names stands in the reference, and nothing that is not there does."""
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE))
    inits = [path for path in (ROOT / "pikv").rglob("__init__.py") if "__all__" in path.read_text()]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert packages <= named, f"docs/reference lacks {packages - named}"
    missing = {
        name
        for name in named
        if not any((ROOT / name.replace(".", "/")).with_suffix(end).exists() for end in ("", ".py"))
    }
    assert not missing, f"docs/reference names {missing}"


def test_decisions_are_numbered() -> None:
    """Decision records have the numbers from 1 on, each once."""
    numbers = sorted(int(page.name[:4]) for page in (ROOT / "docs" / "decisions").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))


def test_names_are_listed() -> None:
    """The table of names in docs/choose.md has every name that composes, and no other."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "choose.md").read_text(), flags=re.MULTILINE)
    listed = {key: set(re.findall(r"`(\w+)`", names)) for key, names in rows if key in PARTS}
    rotated = {f"{name}_rotated" for name in ("int8", "int4", "int2")}  # "and so on"
    assert listed.pop("compressor") | rotated == set(PARTS["compressor"])
    for key in ("streamer", "prefix_store"):
        assert listed.pop(key) - {"folder"} == set(PARTS[key])
    assert listed == {key: set(names) for key, names in PARTS.items() if key in listed}
    assert set(PARTS) - set(listed) == {"compressor", "prefix_store", "streamer"}

"""Text that every machine has: the sources, and the documentation in them, of Python and of installed packages."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from downstream_tasks.shared.errors import TaskError

PYTHON = "python"  # the standard library, by the name of a package
_SKIPPED = {"site-packages", "test", "tests", "testing", "idlelib", "__pycache__", "encodings"}
_LEAST_BYTES = 400  # of a file worth reading
_TENTH = 26  # of 256


@attrs.frozen
class Document:
    """A file: its package, and its path in there. Its text is read when it is asked for."""

    package: str
    name: str
    path: Path

    @property
    def text(self) -> str:
        """All of it, tabs expanded."""
        return self.path.read_text(encoding="utf-8", errors="replace").expandtabs(4)

    @property
    def number(self) -> int:
        """From 0 to 255, by its name: what a file is for goes by this."""
        return hashlib.sha256(self.name.encode()).digest()[0]


def folder_of(package: str) -> Path:
    """Where a package's sources lie. Raises TaskError if it is not installed."""
    if package == PYTHON:
        return Path(sysconfig.get_paths()["stdlib"])
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise TaskError(
            f"package {package!r} is not installed with sources; pip install -e '.[tasks]', or name another"
        )
    return Path(next(iter(found.submodule_search_locations)))


def documents(packages: Iterable[str]) -> Iterator[Document]:
    """The Python files of packages, without their tests, in the order of their names."""
    for package in packages:
        root = folder_of(package)
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if not _SKIPPED & set(name.parts) and path.stat().st_size >= _LEAST_BYTES:
                yield Document(package, name.as_posix(), path)


def split(packages: Iterable[str], *, held_out: bool, validation: bool) -> list[Document]:
    """Files to train on, or those held out: one in ten, which the shipped model never saw.

    validation: leave those alone, and hold out one in ten of the others, to choose flags by.
    """
    first = _TENTH if validation else 0
    return [each for each in documents(packages) if each.number >= first and (each.number < first + _TENTH) == held_out]


def documentation(document: Document) -> list[str]:
    """The docstrings of a file, without the indentation that they have in it."""
    try:
        tree = ast.parse(document.text)
    except SyntaxError:  # a template, or Python of another version
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
    return [inspect.cleandoc(text) for text in found if text]

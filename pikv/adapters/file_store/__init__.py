"""Pages in files."""

from pikv.adapters.file_store.tier import FileTier

__all__ = ["FileTier"]

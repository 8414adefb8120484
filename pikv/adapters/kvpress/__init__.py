"""Presses of NVIDIA's kvpress as token selectors."""

from pikv.adapters.kvpress.selectors import KeyPress, QueryPress, selector_of

__all__ = ["KeyPress", "QueryPress", "selector_of"]

"""Values that a kernel is compiled for: known to the compiler, absent at run time.

A frozen attrs object of a class marked `@static` may be an argument of a compiled function, which is then compiled
anew for each value. Its whole numbers are constants there, so loops over them unroll and branches on them vanish.
"""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

from numba import types
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_constant, lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate
from numba.extending import NativeValue, infer_getattr, typeof_impl, unbox

C = TypeVar("C", bound=type)


class Static(types.Type):  # type: ignore[misc]  # numba carries no annotations
    """The type of one value; two values have two types."""

    def __init__(self, value: Any) -> None:
        self.value = value
        super().__init__(name=f"static({value!r})")

    def __reduce__(self) -> tuple[Any, ...]:
        """For numba's cache on disk, which outlives this class's fields: see `_restored`."""
        return _restored, (pickle.dumps(self.value), self.name)


def _restored(pickled: bytes, name: str) -> Static | types.Opaque:
    """The type as it was written, or an empty one of the same name that the sources of today never ask for."""
    try:
        restored = Static(pickle.loads(pickled))
    except Exception:  # written by other sources: what unpickling meets then may be anything
        return types.Opaque(name)
    return restored if restored.name == name else types.Opaque(name)


register_default(Static)(models.OpaqueModel)


def static(cls: C) -> C:
    """Let objects of this frozen attrs class be arguments of compiled functions."""

    @typeof_impl.register(cls)
    def typeof(value: Any, context: Any) -> Static:
        return Static(value)

    return cls


@unbox(Static)
def _unbox(typ: Static, value: Any, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())


@infer_getattr
class _Attribute(AttributeTemplate):  # type: ignore[misc]
    key = Static

    def generic_resolve(self, typ: Static, name: str) -> types.Type:
        value = getattr(typ.value, name)
        return types.literal(value) if isinstance(value, int) else Static(value)


@lower_getattr_generic(Static)
def _lower(context: Any, builder: Any, typ: Static, value: Any, name: str) -> Any:
    found = getattr(typ.value, name)
    return context.get_constant(types.intp, found) if isinstance(found, int) else context.get_dummy_value()


@lower_constant(Static)
def _global(context: Any, builder: Any, typ: Static, value: Any) -> Any:
    return context.get_dummy_value()

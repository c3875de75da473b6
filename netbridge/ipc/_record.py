"""Plain immutable records without the price of importing `typing` or `dataclasses`.

A driver process is meant to fit in a few megabytes, and either of those costs one or two of them. Type checkers see
`typing.NamedTuple`; at run time the same class bodies become `collections.namedtuple` types.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import NamedTuple
else:
    import collections

    class _RecordType(type):
        def __new__(mcs, name, bases, namespace):
            if not bases:
                return super().__new__(mcs, name, bases, namespace)
            fields = list(namespace.get("__annotations__", ()))
            defaults = [namespace.pop(field) for field in fields if field in namespace]
            plain = collections.namedtuple(name, fields, defaults=defaults, module=namespace["__module__"])
            return type(name, (plain,), {"__slots__": (), **namespace})

    class NamedTuple(metaclass=_RecordType):
        pass


__all__ = ["NamedTuple"]

"""Signatures of Equinox modules for the API reference, which parses source and runs nothing.

A module is a dataclass by its metaclass, so its source does not show what `__init__` takes.
"""

import importlib
import inspect
from typing import Any

import equinox as eqx
import griffe


class ModuleSignatures(griffe.Extension):
    """Gives every `eqx.Module` the `__init__` that Python sees, with annotations as written."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        module = importlib.import_module(cls.module.path)
        found = getattr(module, cls.name, None)
        is_module = isinstance(found, type) and issubclass(found, eqx.Module)
        if not is_module or "__init__" in cls.members:
            return
        parameters = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
        for name, parameter in inspect.signature(found).parameters.items():
            # A setting becomes an array when it is stored, and may be any number before.
            is_setting = name in cls.members and "converter=setting" in str(cls.members[name].value)
            written = "RealScalarLike" if is_setting else _annotation(cls, found, name)
            default = None if parameter.default is parameter.empty else repr(parameter.default)
            parameters.append(
                griffe.Parameter(name, annotation=written, kind=parameters[0].kind, default=default)
            )
        init = griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls)
        cls.set_member("__init__", init)


def _annotation(cls: griffe.Class, found: type, name: str) -> Any:
    """The annotation in the class that declares the field, or in a base class, as written there."""
    if name in cls.members:
        return cls.members[name].annotation
    for base in found.__mro__[1:]:
        if name in getattr(base, "__annotations__", {}):
            written = base.__annotations__[name]
            return written if isinstance(written, str) else inspect.formatannotation(written)
    return None

"""Signatures of Equinox modules for the API reference, which parses source and runs nothing.

A module is a dataclass by its metaclass, so its source does not show what `__init__` takes.
"""

import ast
import importlib
import inspect
import re
import textwrap
from typing import Any

import equinox as eqx
import griffe


KINDS = {
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
}


class ModuleSignatures(griffe.Extension):
    """Gives every `eqx.Module` the `__init__` that Python sees, as written in the source."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        module = importlib.import_module(cls.module.path)
        found = getattr(module, cls.name, None)
        is_module = isinstance(found, type) and issubclass(found, eqx.Module)
        if not is_module or "__init__" in cls.members:
            return
        parameters = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
        # Python allows a parameter without a default after others only if it is keyword-only.
        for name, parameter in inspect.signature(found).parameters.items():
            annotation, value = _written(found, name)
            if "converter=" in value:
                # What becomes an array when it is stored may be any number before.
                annotation = re.sub(r"\b(Float|Real)\[Array, ''\]", "RealScalarLike", annotation)
            elif name in cls.members:
                annotation = cls.members[name].annotation  # which the page may turn into links
            default = None if parameter.default is parameter.empty else _default(value)
            kind = KINDS[parameter.kind]
            parameters.append(
                griffe.Parameter(name, annotation=annotation, kind=kind, default=default)
            )
        init = griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls)
        cls.set_member("__init__", init)


def _written(found: type, name: str) -> tuple[str, str]:
    """Annotation and value of a field in the class that declares it, as written there."""
    for base in found.__mro__:
        if name in inspect.get_annotations(base):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            for node in ast.walk(tree):
                if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
                    value = "" if node.value is None else ast.unparse(node.value)
                    return _short(node.annotation), value
    raise LookupError(f"{found.__name__} has no field {name}")


def _short(annotation: ast.expr) -> str:
    """Without modules: `GradientTransformation`, not `optax.GradientTransformation`."""

    class Names(ast.NodeTransformer):
        def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
            return ast.Name(node.attr)

    return ast.unparse(Names().visit(annotation))


def _default(value: str) -> str:
    """The default in `field(default=...)`, or the value itself."""
    node = ast.parse(value, mode="eval").body
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("field"):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        return given["default"] if "default" in given else f"{given['default_factory']}()"
    return value

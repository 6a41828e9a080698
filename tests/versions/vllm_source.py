"""What an installed or unpacked vLLM defines, read from its source: that vLLM is never imported.

A definition is found by its dotted name, through re-exports and base classes, and described by one line of text: a
signature, an annotation, or where an attribute is assigned. Two versions in which these lines are equal look the same
to whoever calls, overrides or reads them.
"""

import ast
import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """`node` in `module`; a member of a class also knows the class that has it and, if assigned, the method."""

    module: str
    node: ast.AST
    owner: str = ""
    method: str = ""


class VllmSource:
    def __init__(self, folder: Path):
        """folder: what `vllm/` lies in, such as `site-packages` or an unpacked wheel."""
        self.folder = folder
        self._modules: dict[str, dict[str, Definition | str] | None] = {}

    def find(self, name: str) -> Definition | None:
        """What `vllm.some.module.Name` is; None if it is not there, or not vLLM's."""
        if not name.startswith("vllm"):
            return None
        if self.path(name):
            return Definition(name, ast.Module([], []))
        module, _, attribute = name.rpartition(".")
        if not self.path(module):
            owner = self.find(module) if module else None
            return self.member(owner, attribute) if owner else None
        found = self.names(module).get(attribute)
        return self.find(found) if isinstance(found, str) else found

    def path(self, module: str) -> Path | None:
        base = self.folder.joinpath(*module.split("."))
        return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)

    def text(self, name: str) -> str:
        """The source of a module, class or function; empty if there is none."""
        definition = self.find(name)
        if definition is None:
            return ""
        whole = self.path(definition.module).read_text(encoding="utf-8")
        return whole if isinstance(definition.node, ast.Module) else ast.get_source_segment(whole, definition.node)

    def names(self, module: str) -> dict[str, Definition | str]:
        """What a module defines, and the dotted names of what it imports. The first of several definitions counts."""
        if module not in self._modules:
            path = self.path(module)
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            found: dict[str, Definition | str] = {}
            for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body):
                for name, value in _bound(node, package):
                    found.setdefault(name, value if isinstance(value, str) else Definition(module, value))
            self._modules[module] = found
        return self._modules[module]

    def lineage(self, cls: Definition) -> Iterator[Definition]:
        """The class and vLLM's classes that it derives from."""
        yield cls
        for base in cls.node.bases:
            found = self.evaluate(cls.module, base)
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from self.lineage(found)

    def derives_from_others(self, cls: Definition) -> bool:
        """Whether a base class is not vLLM's, so that a member that is not found may be that one's."""
        return any(self.evaluate(c.module, base) is None for c in self.lineage(cls) for base in c.node.bases)

    def member(self, cls: Definition, name: str) -> Definition | None:
        """A method, a field, or an attribute that a method assigns to `self`."""
        if not isinstance(cls.node, ast.ClassDef):
            return None
        for owner in self.lineage(cls):
            node, method = _members(owner.node).get(name, (None, ""))
            if node is not None:
                return Definition(owner.module, node, owner.node.name, method)
        return None

    def evaluate(self, module: str, expression: ast.expr) -> Definition | None:
        """The definition that a (subscripted, optional or quoted) name in a module stands for."""
        match expression:
            case ast.Name(id=name):
                return self.find(f"{module}.{name}")
            case ast.Attribute(value=ast.Name(id=first), attr=attribute):
                found = self.names(module).get(first)
                return self.find(f"{found}.{attribute}") if isinstance(found, str) else None
            case ast.Constant(value=str(text)):
                return self.evaluate(module, ast.parse(text, mode="eval").body)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.evaluate(module, left) or self.evaluate(module, right)
            case ast.Subscript(value=ast.Name(id="Optional" | "SkipValidation"), slice=inner):
                return self.evaluate(module, inner)
        return None

    def type_of(self, definition: Definition) -> Definition | None:
        """The class of vLLM's of which a field, an attribute, a property's value or a function's result is one."""
        node = definition.node
        if isinstance(node, Function):
            annotation = node.returns
        elif isinstance(node, ast.AnnAssign):
            annotation = node.annotation
        elif isinstance(node, ast.arg):  # `self.name = name` of an annotated parameter
            annotation = node.annotation
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            annotation = node.value.func
        else:
            return None
        found = self.evaluate(definition.module, annotation) if annotation is not None else None
        return found if found is not None and isinstance(found.node, ast.ClassDef) else None

    def describe(self, definition: Definition) -> str:
        node, inherited = definition.node, f"{definition.owner}: " if definition.owner else ""
        if isinstance(node, ast.Module):
            return "module"
        if isinstance(node, ast.ClassDef):
            return f"class {node.name}({', '.join(map(ast.unparse, node.bases))})"
        if isinstance(node, Function):
            return inherited + signature(node)
        if definition.method:
            annotation = getattr(node, "annotation", None)
            return f"{inherited}assigned in {definition.method}{f': {ast.unparse(annotation)}' if annotation else ''}"
        if isinstance(node, ast.AnnAssign):
            return f"{inherited}{ast.unparse(node.target)}: {ast.unparse(node.annotation)}"
        text = ast.unparse(node)
        return inherited + (text if len(text) <= 80 else text.partition("=")[0] + "= ...")


def signature(node: Function) -> str:
    decorators = "".join(f"@{ast.unparse(d)} " for d in node.decorator_list)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{decorators}def {node.name}({ast.unparse(node.args)}){result}"


def body_digest(node: Function) -> str:
    """Of what a function does: comments, docstring and layout do not count."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return hashlib.sha256("\n".join(map(ast.unparse, body)).encode()).hexdigest()[:8]


def parameters(text: str) -> ast.arguments:
    """Of a function that `describe` has described."""
    return ast.parse(re.sub(r" \[[0-9a-f]+\]$", "", text[text.index("def ") :]) + ": ...").body[0].args


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under conditions included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for inner in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _bound(node: ast.stmt, package: str) -> Iterator[tuple[str, ast.AST | str]]:
    """Names that a statement binds, with their definition or the dotted name of what was imported."""
    if isinstance(node, ast.ImportFrom):
        parts = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
        origin = ".".join([*parts, *([node.module] if node.module else [])])
        yield from ((alias.asname or alias.name, f"{origin}.{alias.name}") for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
    elif isinstance(node, ast.ClassDef | Function):
        if not any("overload" in ast.unparse(d) for d in node.decorator_list):
            yield node.name, node
    elif isinstance(node, ast.Assign):
        yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id, node


@functools.cache
def _members(cls: ast.ClassDef) -> dict[str, tuple[ast.AST, str]]:
    """Members by name: the node, and the method that assigns it if it is not in the class's body."""
    found = {name: (value, "") for node in reversed(cls.body) for name, value in _bound(node, "")}
    for method in (node for node in cls.body if isinstance(node, Function)):
        given = {argument.arg: argument for argument in method.args.args + method.args.kwonlyargs}
        for node in ast.walk(method):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    match part:
                        case ast.Attribute(value=ast.Name(id="self"), attr=name):
                            value = getattr(node, "value", None)
                            copied = given.get(value.id) if isinstance(value, ast.Name) else None
                            found.setdefault(name, (copied if copied is not None else node, method.name))
    return found

"""What of vLLM this project touches, found in its own source, and a snapshot of it for one version of vLLM.

    python tests/versions/touches.py FOLDER      # FOLDER holds `vllm/`: site-packages, or an unpacked wheel

writes `vllm-MAJOR.MINOR.json` beside this file: each touched name, and what it is in that version. Found are imports,
attributes and calls of what was imported, of parameters annotated with a class of vLLM's, and of `self` in subclasses;
base classes, overridden methods and patched names, both with a digest of their bodies; and the kernels that have a
counterpart for a CPU. What cannot be found is in `touch_tables.py`. `requests-MAJOR.MINOR.json` has the fields of a
request (`request_fields.py`).
"""

import argparse
import ast
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from request_fields import request_fields
from touch_tables import ADDED, NAMES, RELIED_ON, VARIABLES
from vllm_source import Definition, Function, VllmSource, body_digest

HERE = Path(__file__).parent
PROJECT = HERE.parents[1] / "vllm_ctc_spec"


@dataclass
class Found:
    """Touched names: what each is in one vLLM (None: not there), as a definition and in a line; how it is touched in
    which modules of ours; the parameters of overriding methods; the entries of VARIABLES that were of use."""

    names: dict[str, str | None] = field(default_factory=dict)
    definitions: dict[str, Definition | None] = field(default_factory=dict)
    uses: dict[str, set[tuple[str, str]]] = field(default_factory=lambda: defaultdict(set))
    overriding: dict[str, ast.arguments] = field(default_factory=dict)
    variables: set[str] = field(default_factory=set)

    def of_kind(self, kind: str, module: str = "") -> list[str]:
        return sorted(n for n, uses in self.uses.items() if any(k == kind and m.startswith(module) for k, m in uses))


class Touches(ast.NodeVisitor):
    """Touches of one module of ours. A reference is a definition of vLLM's, and whether it is an instance of it."""

    def __init__(self, source: VllmSource, module: str, found: Found):
        self.source, self.module, self.found = source, module, found
        self.scopes: list[dict[str, tuple[str, bool]]] = [{}]
        self.functions: list[str] = []
        self.classes: list[tuple[str, set[str]]] = []  # the vLLM class that is derived from, and names of our own

    def record(self, name: str, kind: str) -> Definition | None:
        definition, cls = self.source.find(name), self.source.find(name.rpartition(".")[0])
        if cls is not None and isinstance(cls.node, ast.ClassDef):
            if definition is None and kind == "read" and self.source.derives_from_others(cls):
                return None  # another library's, as far as one can tell
            name = f"{cls.node.name}.{name.rpartition('.')[2]}"  # it is the class that counts, not its module
        self.found.definitions[name] = definition
        self.found.uses[name].add((kind, self.module))
        return definition

    # Names

    def bind(self, name: str, reference: tuple[str, bool] | None) -> None:
        function = self.functions[-1] if self.functions else ""
        for place in (f"{self.module}.{function}.{name}", f"{self.module}.{name}"):
            if place in VARIABLES:
                self.found.variables.add(place)
                given = VARIABLES[place]
                reference = (given.removeprefix("type:"), not given.startswith("type:"))
        if reference is not None:
            self.scopes[-1][name] = reference
        else:
            self.scopes[-1].pop(name, None)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] == "vllm":
                self.record(alias.name, "import")
                self.scopes[-1][alias.asname or "vllm"] = (alias.name if alias.asname else "vllm", False)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.partition(".")[0] == "vllm":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                self.record(name, "import")
                definition = self.source.find(name)
                variable = definition is not None and isinstance(definition.node, ast.Assign | ast.AnnAssign)
                instance = self.instance_of(definition) if variable else None
                self.scopes[-1][alias.asname or alias.name] = instance or (name, False)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [reference for reference in map(self.evaluate, node.bases) if reference and not reference[1]]
        for name, _ in bases:
            self.record(name, "subclass")
            cls = self.source.find(name)
            for attribute, statement in ((n, s) for s in node.body for n in names_of(s)):
                if self.source.member(cls, attribute) is not None:
                    self.record(f"{name}.{attribute}", "override")
                    if isinstance(statement, Function):
                        self.found.overriding[f"{cls.node.name}.{attribute}"] = statement.args
        if bases:
            own = {n.name for n in node.body if isinstance(n, Function)}
            own |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
            own |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
            self.classes.append((bases[0][0], own))
        for statement in node.body:
            self.visit(statement)
        if bases:
            self.classes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.Lambda) -> None:
        self.functions.append(getattr(node, "name", ""))
        self.scopes.append({})
        for argument in (*node.args.args, *node.args.kwonlyargs):
            annotated = self.annotated(argument.annotation)
            if argument.arg == "self" and self.classes and argument is node.args.args[0]:
                annotated = (self.classes[-1][0], True)
            self.bind(argument.arg, annotated)
            if argument.annotation is not None:
                self.visit(argument.annotation)
        for statement in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(statement)
        self.scopes.pop()
        self.functions.pop()

    visit_Lambda = visit_FunctionDef

    def annotated(self, annotation: ast.expr | None) -> tuple[str, bool] | None:
        if isinstance(annotation, ast.BinOp):
            return self.annotated(annotation.left) or self.annotated(annotation.right)
        reference = self.evaluate(annotation) if annotation is not None else None
        return (reference[0], True) if reference is not None else None

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            names, values = [target], [node.value]
            if isinstance(target, ast.Tuple):
                names = target.elts
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [None] * len(names)
            for name, value in zip(names, values, strict=True):
                if isinstance(name, ast.Name):
                    self.bind(name.id, self.evaluate(value) if value is not None else None)
                else:
                    self.visit(name)

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        for name in (n for n in ast.walk(node.target) if isinstance(n, ast.Name)):
            self.bind(name.id, None)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        for part in (*node.generators, node.elt):
            self.visit(part)

    visit_comprehension = visit_For

    # Expressions

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.evaluate(node.value) is None:
            self.visit(node.value)
        self.evaluate(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.evaluate(node)
        self.generic_visit(node)

    def evaluate(self, node: ast.expr) -> tuple[str, bool] | None:
        """What of vLLM an expression is; records what is touched on the way."""
        match node:
            case ast.Name(id=name):
                return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
            case ast.Call(func=ast.Name(id="super")) if self.classes:
                return self.classes[-1][0], True
            case ast.Call(func=ast.Name(id="type"), args=[value]):
                reference = self.evaluate(value)
                return (reference[0], False) if reference else None
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(attribute)), *_]):
                return self.attribute(self.evaluate(value), attribute, "read")
            case ast.Call(func=function):
                reference = self.evaluate(function)
                return self.result(reference) if reference else None
            case ast.Attribute(value=value, attr=attribute, ctx=context):
                kind = "read" if isinstance(context, ast.Load) else "assign"
                return self.attribute(self.evaluate(value), attribute, kind)
        return None

    def attribute(self, reference: tuple[str, bool] | None, name: str, kind: str) -> tuple[str, bool] | None:
        if reference is None:
            return None
        owner, is_instance = reference
        if name.startswith("__") and self.source.find(f"{owner}.{name}") is None:
            return None  # Python's own
        if not is_instance and kind == "assign":
            kind = "patch"
        own = self.classes[-1][1] if self.classes and owner == self.classes[-1][0] else ()
        if name in own and self.source.find(f"{owner}.{name}") is None:
            return None
        definition = self.record(f"{owner}.{name}", kind)
        if definition is None:
            return None
        if not is_instance and not definition.owner:
            return f"{owner}.{name}", False
        if isinstance(definition.node, Function) and not is_property(definition.node):
            return f"{owner}.{name}", False
        return self.instance_of(definition)

    def result(self, reference: tuple[str, bool]) -> tuple[str, bool] | None:
        definition = self.source.find(reference[0])
        if definition is None or reference[1]:
            return None
        return (reference[0], True) if isinstance(definition.node, ast.ClassDef) else self.instance_of(definition)

    def instance_of(self, definition: Definition) -> tuple[str, bool] | None:
        cls = self.source.type_of(definition)
        return (f"{cls.module}.{cls.node.name}", True) if cls is not None else None


def names_of(statement: ast.stmt) -> list[str]:
    """What a statement of a class's body gives a value."""
    if isinstance(statement, Function):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def is_property(function: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def kernel_names() -> list[str]:
    from vllm_ctc_spec.serving.cpu import table  # which imports no vLLM until it registers

    return sorted(table.by_kernel_name())


def touches(folder: Path, project: Path = PROJECT) -> Found:
    source, found = VllmSource(folder), Found()
    for path in sorted(project.rglob("*.py")):
        parts = path.relative_to(project).with_suffix("").parts
        visitor = Touches(source, ".".join(parts[:-1] if parts[-1] == "__init__" else parts), found)
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    for kind, names in (("read", NAMES), ("kernel", kernel_names())):
        for name in names:
            visitor.record(name, kind)
    for name, definition in found.definitions.items():
        text = source.describe(definition) if definition is not None else None
        changes_behaviour = any(kind in ("override", "patch") for kind, _ in found.uses[name])
        if changes_behaviour and definition is not None and isinstance(definition.node, Function):
            text += f" [{body_digest(definition.node)}]"
        found.names[name] = text
    for name, strings in RELIED_ON.items():
        pattern = ".*".join(map(re.escape, strings))
        found.names[f"{name} (source)"] = (
            ", ".join(strings) if re.search(pattern, source.text(name), re.DOTALL) else None
        )
    found.names = dict(sorted(found.names.items()))
    return found


def version(folder: Path) -> str:
    """MAJOR.MINOR of the vLLM in `folder`, from its metadata."""
    names = [re.match(r"vllm(?:_cpu)?-(\d+\.\d+)", path.name) for path in folder.glob("vllm*.dist-info")]
    return sorted(match[1] for match in names if match)[0]


def snapshot_path(release: str, kind: str = "vllm") -> Path:
    return HERE / f"{kind}-{release}.json"


def write(snapshot: dict, path: Path) -> None:
    path.write_text(json.dumps(snapshot, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds `vllm/`: site-packages, or an unpacked wheel")
    folder = parser.parse_args().folder
    path = snapshot_path(version(folder))
    names = touches(folder).names
    write(names, path)
    write(request_fields(folder), snapshot_path(version(folder), "requests"))
    missing = [name for name, text in names.items() if text is None and name not in ADDED]
    print(f"{path}: {len(names)} names; not in this vLLM: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()

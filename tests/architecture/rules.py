"""The rules that can be read off a source file: each takes a parsed module and yields what breaks it.

A finding is "line: what was found". Files are named by their path below src/accelerate, with slashes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "accelerate"

Rule = Callable[[ast.Module], Iterator[str]]


def sources() -> dict[str, ast.Module]:
    """Every module of the package, parsed, under its path below src/accelerate."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of names, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def aliases(tree: ast.Module) -> dict[str, str]:
    """What each imported name of a module stands for: {"o": "os", "environ": "os.environ"}."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                found[item.asname or item.name.split(".")[0]] = item.name if item.asname else item.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                found[item.asname or item.name] = f"{node.module}.{item.name}"
    return found


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """The dotted name of a node with its first part resolved through the module's imports."""
    head, _, tail = dotted(node).partition(".")
    head = names.get(head, head)
    return f"{head}.{tail}" if tail else head


def environment(tree: ast.Module) -> Iterator[str]:
    """The process environment is read and written in settings/env.py only."""
    gates = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
    names = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            taken = sorted(f"os.{item.name}" for item in node.names if f"os.{item.name}" in gates)
            if taken:
                yield f"{node.lineno}: {', '.join(taken)}"
        elif isinstance(node, ast.Attribute) and full_name(node, names) in gates:
            yield f"{node.lineno}: {full_name(node, names)}"


def forward_replaced(tree: ast.Module) -> Iterator[str]:
    """A module's forward is replaced in runtime/tensors/forward.py only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "forward" and not isinstance(node.ctx, ast.Load):
            yield f"{node.lineno}: {dotted(node) or '….forward'} is assigned or deleted"
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in {"setattr", "__setattr__", "delattr"}:
            if any(_is_forward(argument) for argument in node.args):
                yield f"{node.lineno}: {dotted(node.func)}(…, 'forward')"
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and _is_forward(node.slice):
            yield f"{node.lineno}: ['forward'] is assigned or deleted"


def distributed_type_compared(tree: ast.Module) -> Iterator[str]:
    """Nobody asks which way of distributing is at work, except those whose business it is."""

    def asks(node: ast.AST) -> bool:
        name = dotted(node)
        return name.split(".")[-1] == "distributed_type" or "DistributedType" in name.split(".")[:-1]

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            operands += [
                item
                for operand in operands
                if isinstance(operand, (ast.Tuple, ast.List, ast.Set))
                for item in operand.elts
            ]
            if any(asks(operand) for operand in operands):
                yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Match) and asks(node.subject):
            yield f"{node.lineno}: match {ast.unparse(node.subject)}"


def asks_how_sharded(tree: ast.Module) -> Iterator[str]:
    """No condition is about FSDP or the device mesh; the strategy is asked to act, and knows."""
    words = re.compile(r"fsdp|mesh|parallelism|sharded_by|tp_size|cp_size|dp_shard|dp_replicate", re.IGNORECASE)

    def conditions(node: ast.AST) -> Iterator[ast.expr]:
        for part in ast.walk(node):
            if isinstance(part, (ast.If, ast.IfExp, ast.While, ast.Assert)):
                yield part.test
            elif isinstance(part, ast.comprehension):
                yield from part.ifs
            elif isinstance(part, ast.Match):
                yield part.subject
            elif isinstance(part, ast.BoolOp):
                yield from part.values[:-1]

    for qualified, function in [("", tree), *functions(tree)]:
        inner = {id(part) for _, other in functions(function) for part in ast.walk(other)}
        for condition in conditions(function):
            names = {part.id for part in ast.walk(condition) if isinstance(part, ast.Name)}
            names |= {part.attr for part in ast.walk(condition) if isinstance(part, ast.Attribute)}
            if id(condition) not in inner and any(map(words.search, names)):
                yield f"{qualified}: {ast.unparse(condition)}"


def unsafe_loading(tree: ast.Module) -> Iterator[str]:
    """Bytes from a file or a peer are never unpickled, nor evaluated."""
    refused = {
        *(
            f"{library}.{name}"
            for library in ("pickle", "cPickle", "_pickle", "dill", "cloudpickle")
            for name in ("load", "loads")
        ),
        *("pickle.Unpickler", "dill.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
        *("yaml.unsafe_load", "yaml.full_load", "eval", "exec"),
    }
    names = aliases(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, names)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in refused:
            yield f"{node.lineno}: {name}"
        elif name == "torch.load" and not _is_constant(given.get("weights_only"), True):
            yield f"{node.lineno}: torch.load without weights_only=True"
        elif name == "numpy.load" and "allow_pickle" in given and not _is_constant(given["allow_pickle"], False):
            yield f"{node.lineno}: numpy.load with allow_pickle"
        elif name == "yaml.load" and "Safe" not in ast.unparse(node):
            yield f"{node.lineno}: yaml.load without a safe loader"


def shell(tree: ast.Module) -> Iterator[str]:
    """Commands are lists of arguments; no shell reads them."""
    names = aliases(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, names)
        if name in {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}:
            yield f"{node.lineno}: {name}"
        for keyword in node.keywords:
            if keyword.arg == "shell" and not _is_constant(keyword.value, False):
                yield f"{node.lineno}: {name}(shell=…)"


def private_torch(tree: ast.Module) -> Iterator[str]:
    """Names that torch keeps to itself come and go between its releases."""
    names = aliases(tree)
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            used = [f"{node.module}.{item.name}" for item in node.names]
        elif isinstance(node, ast.Attribute):
            used = [full_name(node, names)]
        else:
            continue
        for name in used:
            parts = name.split(".")
            if parts[0] == "torch" and any(part.startswith("_") and not part.endswith("__") for part in parts):
                found.setdefault(name, node.lineno)
    for name, line in found.items():
        if not any(name != longer and longer.startswith(f"{name}.") for longer in found):
            yield f"{name}: line {line}"


def imports_shop_window(tree: ast.Module) -> Iterator[str]:
    """`accelerate.utils` re-exports for users; inside the package one imports from the real home."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            # Relative imports count from anywhere: a module named utils exists once, at the top.
            base = f"accelerate.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            modules = [base, *(f"{base}.{item.name}" for item in node.names)]
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in {"import_module", "__import__"}:
            modules = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        if any(str(module) == "accelerate.utils" or str(module).startswith("accelerate.utils.") for module in modules):
            yield f"{node.lineno}: {ast.unparse(node)}"


def defines_something(tree: ast.Module) -> Iterator[str]:
    """A module of `accelerate.utils` holds no code of its own beyond the look-up of names."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in {"__getattr__", "__dir__"}:
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield f"{node.lineno}: defines {node.name}"


def long_functions(tree: ast.Module, limit: int = 60) -> Iterator[str]:
    """A function's body, its docstring aside, fits a screen."""
    for qualified, node in functions(tree):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = (node.end_lineno or node.lineno) - body[0].lineno + 1 if body else 0
        if lines > limit:
            yield f"{qualified}: {lines} lines"


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its qualified name."""

    def walk(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ".".join((*path, child.name)), child
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            yield from walk(child, (*path, child.name) if named else path)  # type: ignore[attr-defined]

    return walk(tree, ())


def strategy_classes(tree: ast.Module) -> list[str]:
    """Lists the concrete subclasses of strategies in a module: these make it a backend. A common base derives from ABC."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = {node.name: [dotted(base).split(".")[-1] for base in node.bases] for node in classes}
    return [name for name, of in bases.items() if "ABC" not in of and any(base.endswith("Strategy") for base in of)]


def imported_siblings(tree: ast.Module, siblings: set[str]) -> list[str]:
    """Which of the backend modules beside it a strategy module imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            parts = [item.name.split(".") for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            head = (node.module or "").split(".")
            parts = [[*head, item.name] for item in node.names]
            if node.level > 1 or (not node.level and "strategies" not in head):
                parts = []
        else:
            continue
        found += [f"{node.lineno}: {'.'.join(part)}" for part in parts if siblings & set(part)]
    return found


def _is_forward(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == "forward"


def _is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value

"""The rules for the files that travel with a checkpoint: what modeling_hybrid_linear.py imports, directly or not.

    python -m tests.check_shipped_files

save_pretrained finds these files by a regular expression over the text, and loading with trust_remote_code refuses
packages that are not installed. What Python accepts and that expression does not is thus found by whoever loads the
checkpoint, not by whoever wrote the file; this check finds it first. Prints every violation, exits 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

PACKAGE = Path(__file__).resolve().parent.parent / "hybrid_models"
ENTRY = "modeling_hybrid_linear.py"
# What a checkpoint may count on: setup.cfg's install_requires, and what those always bring.
ALWAYS_THERE = {"huggingface_hub", "numpy", "safetensors", "torch", "transformers"}


def shipped_files(package: Path = PACKAGE) -> list[Path]:
    """ENTRY and every file it imports relatively, through any number of others, as Python sees it."""
    found, todo = [], [package / ENTRY]
    while todo:
        path = todo.pop()
        if path not in found and path.is_file():
            found.append(path)
            todo += [package / f"{name}.py" for name in _relative_imports(_parse(path))]
    return sorted(found)


def violations(package: Path = PACKAGE) -> list[str]:
    """Every breach as "file:line: what; remedy"."""
    folders = {path.parent.name for path in package.glob("*/*.py")}
    found = [f"{package.name}/{name}/: a sub-package; shipped files are flat siblings" for name in sorted(folders)]
    files = shipped_files(package)
    for path in files:
        found += [f"{path.name}:{line}: {text}" for line, text in sorted(_violations_in(path))]
    if not found:  # transformers itself stumbles over some of the above
        seen = {Path(name).name for name in get_relative_import_files(str(package / ENTRY))}
        for path in files:
            if path.name not in seen | {ENTRY}:
                found.append(f"{path.name}: imported, but not where a line begins with `from .{path.stem} import`")
    return found


def _violations_in(path: Path) -> Iterator[tuple[int, str]]:
    tree = _parse(path)
    yield from _relative_import_rules(path, tree)
    yield from _absolute_import_rules(path, tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in ("isinstance", "issubclass") and len(node.args) == 2:
            if any(name.endswith("HybridLinearConfig") for name in _names(node.args[1])):
                yield node.lineno, f"{name} on HybridLinearConfig; two copies of that class can exist, read its fields"
        if name == "register" and any(name.startswith("Auto") for name in _names(node.func)):
            yield node.lineno, "registers an Auto class; only the package's __init__ does that"
        if name in ("import_module", "__import__"):
            yield node.lineno, f"{name}() hides an import from transformers; write it as a statement"


def _relative_import_rules(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        written = f"from {'.' * node.level}{node.module or ''} import ..."
        if node.level > 1 or node.module is None or "." in node.module:
            yield node.lineno, f"`{written}`; only `from .sibling import name` is found when a checkpoint is saved"
        elif not (path.parent / f"{node.module}.py").is_file():
            yield node.lineno, f"`{written}`; there is no {node.module}.py beside it"
    lines = path.read_text(encoding="utf-8").splitlines()
    as_transformers_reads = {name.split(".")[0] for name in get_relative_imports(str(path))} - {""}
    for name in as_transformers_reads - set(_relative_imports(tree)):
        matching = (
            i for i, line in enumerate(lines, 1) if re.match(rf"\s*(from|import)\s+\.{re.escape(name)}\b", line)
        )
        yield next(matching), f"text that transformers reads as an import of .{name}; word it otherwise"


def _absolute_import_rules(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    guarded = {id(child) for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        else:
            continue
        for top in (module.split(".")[0] for module in modules):
            if top == PACKAGE.name:
                yield node.lineno, f"imports {top} absolutely; use `from .sibling import name`"
            elif top not in ALWAYS_THERE | sys.stdlib_module_names and id(node) not in guarded:
                yield node.lineno, f"imports {top}, which a user may not have; put it inside try:"


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _relative_imports(tree: ast.Module) -> list[str]:
    """First names of relatively imported modules; those of `from . import a, b` are a and b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names += [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
    return names


def _names(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        yield getattr(child, "id", getattr(child, "attr", "")) or ""


def main() -> int:
    found = violations()
    print("\n".join(found) or f"shipped files: {', '.join(path.name for path in shipped_files())}: all rules hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

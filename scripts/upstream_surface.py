"""Writes tests/python/upstream_surface.json: the names and signatures of upstream's Python modules.

    python scripts/upstream_surface.py flash_attn-2.8.3.tar.gz

The archive is upstream's source distribution (pip download --no-binary :all: flash-attn==2.8.3).
It is parsed, never imported. Only facts that clients depend on are kept: what a module defines or
passes on, parameter names, their order and kinds, and defaults. FlashAttention-4 (`cute`) and the
Triton kernels for AMD are left out.
"""

from __future__ import annotations

import ast
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "tests/python/upstream_surface.json"
LEFT_OUT = ("flash_attn/cute/", "flash_attn/flash_attn_triton_amd/")


def parameters(arguments: ast.arguments) -> str:
    """The parameters as one would write them, without annotations: ``q, k=None, *, p=0.0``."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)

    def text(name: str, default: ast.expr | None) -> str:
        return name if default is None else f"{name}={ast.unparse(default)}"

    found = [text(a.arg, d) for a, d in zip(positional, defaults)]
    if arguments.vararg:
        found.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        found.append("*")
    found += [text(a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return ", ".join(found + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else []))


def names_of(target: ast.expr) -> list[str]:
    if isinstance(target, ast.Name):
        return [target.id]
    return [n for e in getattr(target, "elts", ()) for n in names_of(e)]


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Module-level statements, those inside try and if included."""
    found = []
    for node in body:
        found.append(node)
        if isinstance(node, (ast.Try, ast.If)):
            handlers = [h.body for h in getattr(node, "handlers", [])]
            for part in (node.body, *handlers, node.orelse):
                found += statements(part)
    return found


def is_triton(node: ast.FunctionDef) -> bool:
    return any("triton." in ast.unparse(decorator) for decorator in node.decorator_list)


def surface(source: str) -> dict[str, Any]:
    functions: dict[str, str] = {}
    kernels: list[str] = []
    classes: dict[str, dict[str, str]] = {}
    assigned: set[str] = set()
    passed_on: set[str] = set()
    for node in statements(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and is_triton(node):
            kernels.append(node.name)
        elif isinstance(node, ast.FunctionDef):
            functions[node.name] = parameters(node.args)
        elif isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            classes[node.name] = {m.name: parameters(m.args) for m in methods}
        elif isinstance(node, ast.Assign):
            assigned |= {name for target in node.targets for name in names_of(target)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flash_attn"):
            passed_on |= {alias.asname or alias.name for alias in node.names}
    return {
        "functions": functions,
        "classes": classes,
        "triton_kernels": sorted(kernels),
        "assigned": sorted(assigned - {"__version__"}),
        "passed_on": sorted(passed_on - set(functions) - set(classes)),
    }


def main(archive: str) -> None:
    modules: dict[str, Any] = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = member.name.partition("/")[2]
            if not path.startswith("flash_attn/") or not path.endswith(".py"):
                continue
            if path.startswith(LEFT_OUT):
                continue
            name = path[:-3].replace("/", ".").removesuffix(".__init__")
            file = tar.extractfile(member)
            assert file is not None
            modules[name] = surface(file.read().decode())
    TARGET.write_text(json.dumps(dict(sorted(modules.items())), indent=1) + "\n")
    print(f"{TARGET.name}: {len(modules)} modules")


if __name__ == "__main__":
    main(*sys.argv[1:])

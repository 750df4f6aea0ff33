"""Every module of upstream 2.8.3 is there, with upstream's names and signatures.

upstream_surface.json holds the facts (scripts/upstream_surface.py writes it).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SURFACE: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("upstream_surface.json").read_text()
)

# Not offered; importing one raises an ImportError that says what it was and what works instead.
REFUSED = (
    "flash_attn.flash_blocksparse_attention",
    "flash_attn.flash_blocksparse_attn_interface",
    "flash_attn.flash_attn_triton_og",
)
OFFERED = [name for name in SURFACE if name not in REFUSED]

# Where ours differs on purpose: module.name[.method] -> why.
DIFFERENT: dict[str, str] = {
    **dict.fromkeys(
        (
            "flash_attn.flash_attn_interface.noop_custom_op_wrapper",
            "flash_attn.flash_attn_interface.noop_register_fake_wrapper",
            "flash_attn.flash_attn_interface._torch_custom_op_wrapper",
            "flash_attn.flash_attn_interface._torch_register_fake_wrapper",
            "flash_attn.ops.triton.layer_norm.custom_bwd",
            "flash_attn.ops.triton.layer_norm.custom_fwd",
            "flash_attn.ops.triton.layer_norm.triton_op",
        ),
        "how upstream registers its operators, not what they are",
    ),
    **dict.fromkeys(
        (
            "flash_attn.ops.activations.swiglu_fwd_codestring",
            "flash_attn.ops.activations.swiglu_bwd_codestring",
        ),
        "CUDA source of upstream's",
    ),
    **dict.fromkeys(
        (
            "flash_attn.ops.triton.linear.init_to_zero",
            "flash_attn.ops.triton.linear.get_configs_io_bound",
        ),
        "tuning of a Triton kernel",
    ),
    "flash_attn.layers.rotary.RotaryEmbedding.__init__": (
        "also takes pos_idx_in_fp32, keyword-only: upstream had it until 2.7, Evo 1 and the "
        "ModernBERT of transformers 4.48 pass it"
    ),
}

REQUIRED = inspect.Parameter.empty


def _expected(parameters: str) -> list[tuple[str, str, Any]]:
    """(name, kind, default) of each; a default that is no literal stands as an Ellipsis."""

    def value(node: ast.expr | None) -> Any:
        if node is None:
            return REQUIRED
        try:
            return ast.literal_eval(node)
        except ValueError:
            return ...

    arguments = ast.parse(f"def f({parameters}): ...").body[0].args  # type: ignore[attr-defined]
    before = len(arguments.args) - len(arguments.defaults)
    defaults = [None] * before + list(arguments.defaults)
    found = [(a.arg, "positional", value(d)) for a, d in zip(arguments.args, defaults)]
    if arguments.vararg:
        found.append((arguments.vararg.arg, "args", REQUIRED))
    found += [
        (a.arg, "keyword", value(d)) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)
    ]
    if arguments.kwarg:
        found.append((arguments.kwarg.arg, "kwargs", REQUIRED))
    return found


_KINDS = {
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
    inspect.Parameter.VAR_POSITIONAL: "args",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_KEYWORD: "kwargs",
}


def _assert_same_signature(ours: Any, parameters: str, where: str) -> None:
    expected = _expected(parameters)
    actual = [
        (p.name, _KINDS.get(p.kind, str(p.kind)), p.default)
        for p in inspect.signature(ours).parameters.values()
    ]
    assert [a[:2] for a in actual] == [e[:2] for e in expected], where
    for (name, _, got), (_, _, wanted) in zip(actual, expected):
        if wanted is ...:
            assert got is not REQUIRED, f"{where}: {name} lost its default"
        else:
            assert got == wanted and type(got) is type(wanted), f"{where}: {name}={got!r}"


@pytest.mark.parametrize("name", OFFERED)
def test_names_and_signatures(name):
    module = importlib.import_module(name)
    facts = SURFACE[name]
    for function, parameters in facts["functions"].items():
        where = f"{name}.{function}"
        if function.startswith("_") or where in DIFFERENT:
            continue
        _assert_same_signature(getattr(module, function), parameters, where)
    for cls, methods in facts["classes"].items():
        if f"{name}.{cls}" in DIFFERENT:
            continue
        ours = getattr(module, cls)
        for method, parameters in methods.items():
            where = f"{name}.{cls}.{method}"
            # Of an autograd function anybody calls apply(); its forward and backward are ours.
            if hasattr(ours, "apply") and method in ("forward", "backward") and "ctx" in parameters:
                continue
            if where not in DIFFERENT:
                found = getattr(ours, method)
                found = getattr(found, "__func__", found)  # of a class method, with its cls
                _assert_same_signature(found, parameters, where)
    for passed_on in (*facts["assigned"], *facts["passed_on"]):
        if f"{name}.{passed_on}" not in DIFFERENT:
            assert hasattr(module, passed_on), f"{name}.{passed_on}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_works(name):
    with pytest.raises(ImportError, match="anyflash"):
        importlib.import_module(name)


def test_differences_are_real():
    """No entry of DIFFERENT names something that upstream does not have."""
    for where in DIFFERENT:
        module = max((m for m in SURFACE if where.startswith(m + ".")), key=len)
        facts = SURFACE[module]
        first, _, method = where[len(module) + 1 :].partition(".")
        known = {*facts["functions"], *facts["classes"], *facts["assigned"], *facts["passed_on"]}
        assert first in known, where
        assert not method or method in facts["classes"][first], where


def test_no_import_needs_more_than_torch():
    """Neither CUDA, Triton, a compiler nor transformers: models load theirs when they are used."""
    blocked = ("triton", "transformers", "timm", "sentencepiece", "torchvision", "huggingface_hub")
    program = f"""
import importlib, os, sys
import torch
for name in {blocked!r}:
    sys.modules[name] = None
for name in {OFFERED!r}:
    child = os.fork()  # each module is the first that a process imports
    if child == 0:
        module = importlib.import_module(name)
        os._exit(0 if "anyflash" in module.__file__ else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

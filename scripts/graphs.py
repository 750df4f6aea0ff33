"""Runs every public function in every way that torch has to take a program, compares results and
gradients with eager mode, and writes what came out into docs/graphs.md.

    python scripts/graphs.py           # write; some minutes
    python scripts/graphs.py --quick   # exit 1 where a cell of a few rows says something else

The functions are tests/python/graph_cases.py's.
"""

from __future__ import annotations

import logging
import os
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from typing import Any

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(CHECKOUT / "tests/python")]

import torch  # noqa: E402
from graph_cases import CASES, function_of, gradients, make, results  # noqa: E402
from test_no_host_syncs import _call as call_on_fake_cuda  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

PAGE = CHECKOUT / "docs/graphs.md"
BEGIN, END = "<!-- table: python scripts/graphs.py -->", "<!-- end of table -->"
SIZES = ((5, 22), (7, 31), (6, 12))
QUICK = ("flash_attn_varlen_func", "fused_mlp", "swiglu", "attention_kvcache")
#: AOTInductor compiles C++: a few functions speak for all.
PACKAGED = (
    "attention",
    "attention, packed, max_seqlen int",
    "attention_kvcache",
    "fused_mlp",
    "MHA",
)
OPS = torch.ops.anyflash


class Refused(Exception):
    """What a cell says in the place of a result."""


class Wrapped(torch.nn.Module):
    """A case as a module, with the parameters that it has, whose result is a tuple of tensors."""

    def __init__(self, name: str) -> None:
        super().__init__()
        function, _ = function_of(name)
        self.module = function.args[0] if CASES[name].module is not None else None
        self.function = function

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        return tuple(results(self.function(*args)))


def _outcome(name: str, function: Callable[..., Any], module: torch.nn.Module, seed: int) -> list:
    """Results, and gradients of leaves and parameters where there are any."""
    leaves, others = make(name, *SIZES[seed], seed=seed)
    found = results(function(*leaves, *others))
    if CASES[name].why_not is None:
        parameters = tuple(x for _, x in sorted(module.named_parameters()))
        found = [*found, *gradients(found, (*leaves, *parameters))]
    return found


def _compare(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def _same(name: str, function: Callable[..., Any], module: torch.nn.Module, seed: int = 0) -> None:
    wrapped = Wrapped(name)
    _compare(_outcome(name, function, module, seed), _outcome(name, wrapped, wrapped, seed))


# ---- The ways: each returns what its cell says.


def _compiled(name: str, dynamic: bool | None, seeds: Iterable[int]) -> str:
    wrapped = Wrapped(name)
    compiled = torch.compile(wrapped, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for seed in seeds:
        _same(name, compiled, wrapped, seed)
    return str(counters["stats"]["unique_graphs"])


def compiled(name: str) -> str:
    return _compiled(name, None, (0, 0))


def dynamic(name: str) -> str:
    return _compiled(name, True, range(len(SIZES)))


def _exported(name: str, strict: bool) -> str:
    leaves, others = make(name, *SIZES[0])
    program = torch.export.export(Wrapped(name), (*leaves, *others), strict=strict)
    module = program.module()
    _same(name, module, module)
    return "1"


def export_strict(name: str) -> str:
    return _exported(name, True)


def export_loose(name: str) -> str:
    return _exported(name, False)


def packaged(name: str) -> str:
    """The forward: a package computes nothing else."""
    if name not in PACKAGED:
        return ""
    leaves, others = make(name, *SIZES[0])
    given = [x.detach() if isinstance(x, Tensor) else x for x in (*leaves, *others)]
    wrapped = Wrapped(name)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(wrapped, tuple(given), strict=False)
        path = f"{folder}/case.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        runner = torch._inductor.aoti_load_package(path)
        fresh = [[x.clone() if isinstance(x, Tensor) else x for x in given] for _ in range(2)]
        _compare(runner(*fresh[0]), wrapped(*fresh[1]))
    return "1"


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return OPS.flash_attn_func(q, k, v)


def _packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    return OPS.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)


def _step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor) -> Tensor:
    out = OPS.flash_attn_with_kvcache(q * 2, keys, values, k, v, cache_seqlens=n, causal=True)
    return out + 1


def _mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return OPS.fused_mlp(x, w1, b1, w2, b2, "silu_gate")


SCRIPTED: dict[str, Callable[..., Tensor]] = {
    "flash_attn_func, grouped heads": _dense,
    "flash_attn_varlen_func": _packed,
    "attention_kvcache": _step,
    "fused_mlp": _mlp,
}


def scripted(name: str) -> str:
    if name not in SCRIPTED:
        raise Refused("TorchScript takes operators, `torch.ops.anyflash.*`, and the models traced")
    _same(name, torch.jit.script(SCRIPTED[name]), torch.nn.Module())
    return "1"


def traced(name: str) -> str:
    leaves, others = make(name, *SIZES[0])
    if any(not isinstance(x, Tensor) for x in others):
        others = tuple(torch.tensor(x) if isinstance(x, int) else x for x in others)
    wrapped = Wrapped(name)
    module = torch.jit.trace(wrapped, (*leaves, *others), check_trace=False)

    def call(*args: Any) -> Any:
        return module(*(torch.tensor(x) if isinstance(x, int) else x for x in args))

    _same(name, call, wrapped)
    return "1"


def _needs_gradient(name: str) -> None:
    if CASES[name].why_not is not None:
        raise Refused(CASES[name].why_not)


def vmapped(name: str) -> str:
    _needs_samples(name)
    drawn = [make(name, *SIZES[2], seed=seed) for seed in range(2)]
    leaves = [torch.stack(x).detach() for x in zip(*(inputs.leaves for inputs in drawn))]
    others = drawn[0].others
    wrapped = Wrapped(name)

    def loss(*args: Any) -> Tensor:
        return sum((x.sin().sum() for x in wrapped(*args)), torch.zeros(()))

    gradient = torch.func.grad(loss, tuple(range(len(leaves))))
    dims = (*(0 for _ in leaves), *(None for _ in others))
    found = torch.vmap(gradient, dims)(*leaves, *others)
    expected = [gradient(*(x[i] for x in leaves), *others) for i in range(2)]
    _compare(found, (torch.stack(x) for x in zip(*expected)))
    return "yes"


def _needs_samples(name: str) -> None:
    _needs_gradient(name)
    if not make(name, *SIZES[2]).leaves:
        raise Refused("asks for token numbers, which have no gradient")


def func_grad(name: str) -> str:
    _needs_samples(name)
    leaves, others = make(name, *SIZES[0])
    wrapped = Wrapped(name)

    def loss(*args: Any) -> Tensor:
        return sum((x.sin().sum() for x in wrapped(*args)), torch.zeros(()))

    expected = torch.autograd.grad(loss(*leaves, *others), leaves)
    detached = [x.detach() for x in leaves]
    _compare(torch.func.grad(loss, tuple(range(len(leaves))))(*detached, *others), expected)
    return "yes"


def cuda_graph(name: str) -> str:
    call_on_fake_cuda(name)
    return "yes"


WAYS: dict[str, Callable[[str], str]] = {
    "compile": compiled,
    "dynamic": dynamic,
    "export, strict": export_strict,
    "export": export_loose,
    "AOTI": packaged,
    "script": scripted,
    "trace": traced,
    "vmap": vmapped,
    "func.grad": func_grad,
    "CUDA graph": cuda_graph,
}

#: What an error says -> what the page says.
REASONS = {
    "_local_scalar_dense": "max_seqlen is read from the device; give an int",
}


def cell(name: str, way: str) -> tuple[str, str | None]:
    """(text, reason) of a cell; a reason where the text is a refusal."""
    torch._dynamo.reset()
    counters.clear()
    try:
        return WAYS[way](name), None
    except Refused as refusal:
        return "no", str(refusal)
    except Exception as error:  # noqa: BLE001 - is what the table shows
        text = str(error).strip().splitlines()[0]
        known = (reason for words, reason in REASONS.items() if words in str(error))
        return "no", next(known, f"{type(error).__name__}: {text[:140]}")


def rows(names: Iterable[str], ways: Iterable[str]) -> dict[str, list[tuple[str, str | None]]]:
    found = {}
    for name in names:
        found[name] = [cell(name, way) for way in ways]
        print(name, *(f"{text} {reason or ''}" for text, reason in found[name]), sep=" | ")
    return found


def table(found: dict[str, list[tuple[str, str | None]]]) -> str:
    """The rows as a table, with the reasons as numbered notes under it."""
    notes: list[str] = []
    lines = [f"| function | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for name, cells in found.items():
        texts = []
        for text, reason in cells:
            if reason is not None:
                if reason not in notes:
                    notes.append(reason)
                text += f" ({notes.index(reason) + 1})"
            texts.append(text)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines)


def written(names: Iterable[str]) -> dict[str, list[str]]:
    """The rows of the page, without the numbers of their notes."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [x.strip() for x in line.strip("|").split("|")]
        if cells[0] in names:
            found[cells[0]] = [x.split(" (")[0] for x in cells[1:]]
    return found


def main() -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        if "--quick" in sys.argv[1:]:
            ways = [way for way in WAYS if way != "AOTI"]
            page, wrong = written(QUICK), 0
            for name, cells in rows(QUICK, ways).items():
                said = dict(zip(WAYS, page[name]))
                for way, (text, _) in zip(ways, cells):
                    if said[way] != text:
                        print(f"{PAGE.name}: {name}, {way}: says {said[way]!r}, is {text!r}")
                        wrong += 1
            return 1 if wrong else 0
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, tail = rest.partition(END)
        text = table(rows(CASES, WAYS))
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

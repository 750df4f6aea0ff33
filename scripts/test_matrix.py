"""Runs anyflash on old and new torch and Python: `make test-matrix` -> docs/test_matrix.md.

Every row uses the same files: one wheel, built here, unpacked once. So a row on torch 2.10 or
newer also shows that one binary serves them all, and an older one that the Python operators take
over. Every cell is a fresh process. Environments are kept under out/matrix (about 25 GB, most of
it CUDA libraries that torch requires); uv's cache there shares equal files between them.

usage: test_matrix.py [--only TORCH ...]     (with --only the table stays as it is)
exit status 1 when a cell fails
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "out" / "matrix"
TABLE = REPOSITORY / "docs" / "test_matrix.md"

# torch, the Python to run it with, what else its age asks for
ROWS = [
    ("2.0.1", "3.9", ["numpy<2", "setuptools<81"]),
    ("2.4.1", "3.10", ["numpy<2"]),
    ("2.9.1", "3.12", ["numpy"]),
    ("2.10.0", "3.10", ["numpy"]),
    ("2.13.0", "3.11", ["numpy"]),
    ("newest", "3.13", ["numpy"]),
]

PREPARE = """
import math, torch, flash_attn
torch.manual_seed(0)
q, k, v = (torch.randn(2, 33, 4, 32, requires_grad=True) for _ in range(3))

def plain(q, k, v):
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", score.masked_fill(hidden, -math.inf).softmax(-1), v)

def check(function):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, expected = function(*inputs), plain(q, k, v)
    found = torch.autograd.grad(out.sin().sum(), inputs)
    wanted = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    for a, b in zip((out, *found), (expected, *wanted)):
        assert (a - b).abs().max() < 1e-5, (a - b).abs().max()
"""

CELLS = {
    "import": """
import torch, flash_attn, flash_attn.bert_padding, flash_attn_2_cuda, importlib.metadata
assert flash_attn.__version__ == importlib.metadata.version("flash_attn") == "2.8.3"
from anyflash import _loader
print(_loader.provider, torch.__version__)
""",
    "forward": PREPARE
    + """
with torch.no_grad():
    expected = plain(q, k, v)
    assert (flash_attn.flash_attn_func(q, k, v, causal=True) - expected).abs().max() < 1e-5
    lengths = torch.tensor([0, 33, 66], dtype=torch.int32)
    packed = [x.reshape(-1, 4, 32) for x in (q, k, v)]
    out = flash_attn.flash_attn_varlen_func(*packed, lengths, lengths, 33, 33, causal=True)
    assert (out.view_as(q) - expected).abs().max() < 1e-5
""",
    "backward": PREPARE
    + """
check(lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True))
""",
    "compile": PREPARE
    + """
def function(q, k, v):
    return flash_attn.flash_attn_func(q * 1.0, k, v, causal=True) * 1.0

try:
    check(torch.compile(function, fullgraph=True))
    print("one graph")
except torch._dynamo.exc.Unsupported:
    torch._dynamo.reset()
    check(torch.compile(function))
    print("graph breaks")
""",
    "cases": """
import torch, anyflash
from anyflash.testing import CORRECTNESS, assert_close, expect, make_inputs

ran = 0
for case in CORRECTNESS:
    inputs = make_inputs(case, "cpu")
    graded = inputs.differentiable() if case.differentiable else {}
    try:
        expected = expect(inputs, gradients=bool(graded), dlse=False)
    except RuntimeError as error:  # of PyTorch's own operations, in the reference
        assert "not implemented for 'Half'" in str(error), error
        continue
    for x in graded.values():
        x.requires_grad_()
    out, lse = anyflash.attention(*inputs.qkv, **inputs.options, return_lse=True)
    found = {"out": out, "lse": lse}
    if graded:
        gradients = torch.autograd.grad(out, tuple(graded.values()), inputs.dout)
        found.update(zip(graded, gradients))
    for name, x in found.items():
        assert_close(x, expected.exact[name], expected.low[name], f"{case.name} {name}")
    ran += 1
print(f"{ran} of {len(CORRECTNESS)}")
""",
    "around": """
import torch, anyflash
torch.manual_seed(0)
x = torch.randn(2, 9, 4, 16, requires_grad=True)
cos, sin = torch.randn(9, 8), torch.randn(9, 8)
turned = anyflash.rotary(x, cos, sin)
a, b = x[..., :8], x[..., 8:]
c, s = cos[:, None], sin[:, None]
wanted = torch.cat((a * c - b * s, a * s + b * c), -1)
pairs = [(turned, wanted)]
rows, weight, bias = x.reshape(72, 16), torch.randn(16), torch.randn(16)
normed = torch.nn.functional.layer_norm(rows, (16,), weight, bias, 1e-5)
pairs.append((anyflash.layer_norm(rows, weight, bias, eps=1e-5), normed))
labels = torch.randint(16, (72,))
entropy = torch.nn.functional.cross_entropy(rows, labels, reduction="none")
losses = anyflash.cross_entropy(rows, labels)
pairs.append((losses[0] if isinstance(losses, tuple) else losses, entropy))
up, down = torch.randn(32, 16), torch.randn(16, 32)
plain = torch.nn.functional.gelu(rows @ up.t(), approximate="tanh") @ down.t()
pairs.append((anyflash.fused_mlp(rows, up, None, down, None), plain))
for found, expected in pairs:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    a, b = (torch.autograd.grad(y.sin().sum(), x, retain_graph=True)[0] for y in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
""",
    "kernel": """
import anyflash
from anyflash import _loader
for dtype in ("fp32", "bf16"):
    answer = anyflash.explain(f"{dtype} causal head_dim 64 training", isa=_loader.cpu_isa())
    names = [decision["instance"] for decision in answer.decisions]
    assert None not in names, answer
print(names[0].rpartition("_")[2])
""",
    "doctor": """
import json, subprocess, sys
command = [sys.executable, "-m", "anyflash", "doctor", "--json"]
done = subprocess.run(command, capture_output=True, text=True)
json.loads(done.stdout)
""",
}


def run(*command, limit: float | None = None, **environment) -> subprocess.CompletedProcess:
    ours = ("ANYFLASH_", "PYTHON", "VIRTUAL_ENV")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment = {**inherited, **environment}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=limit
    )


def must(*command, **environment) -> str:
    done = run(*command, **environment)
    if done.returncode:
        said = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
        raise SystemExit(f"{' '.join(map(str, command))}\n{said}")
    return done.stdout


def install_anyflash() -> Path:
    """Builds the wheel and unpacks it; the same files then serve every row."""
    target = FOLDER / "anyflash"
    wheels = FOLDER / "wheel"
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(wheels, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", wheels)
    must(*pip, "wheel", *options, REPOSITORY, ANYFLASH_BUILD="1")
    must(*pip, "install", "--no-deps", "--target", target, next(wheels.glob("*.whl")))
    return target


def find_python(version: str) -> Path | None:
    """An interpreter of that version on this machine: on the path, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    return next((Path(c) for c in candidates if c and not run(c, "--version").returncode), None)


def interpreter(torch_version: str, python: str, extra: list[str]) -> Path | None:
    """The Python of a row's environment, made when missing; None without such a Python."""
    base = find_python(python)
    if base is None:
        return None
    folder = FOLDER / f"torch-{torch_version}-python-{python}"
    made = folder / "made"
    if not made.exists():
        shutil.rmtree(folder, ignore_errors=True)
        uv = (sys.executable, "-m", "uv", "--quiet")
        settings = {"UV_CACHE_DIR": str(FOLDER / "uv-cache"), "UV_HTTP_TIMEOUT": "300"}
        must(*uv, "venv", "--python", base, folder, **settings)
        torch_package = "torch" if torch_version == "newest" else f"torch=={torch_version}"
        packages = (torch_package, "einops", "packaging", "setuptools", *extra)
        must(*uv, "pip", "install", "--python", folder / "bin/python", *packages, **settings)
        made.touch()
    return folder / "bin/python"


def cell(python: Path, package: Path, code: str) -> tuple[str, str]:
    """Runs one cell; returns what the table shows and what the process printed last."""
    start = time.perf_counter()
    paths = f"{package / 'anyflash/dropin'}:{package}"
    done = run(python, "-W", "ignore", "-c", code, PYTHONPATH=paths, OMP_NUM_THREADS="2")
    seconds = time.perf_counter() - start
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0:
        return f"ok, {seconds:.1f} s", said
    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    print(done.stderr[-3000:], file=sys.stderr)
    return f"**failed**: {error[:100].replace('|', '/')}", said


def rows(only: list[str]) -> Iterator[dict[str, str]]:
    package = install_anyflash()
    for torch_version, python, extra in ROWS:
        if only and torch_version not in only:
            continue
        executable = interpreter(torch_version, python, extra)
        if executable is None:
            print(f"torch {torch_version}: left out, no Python {python} here", file=sys.stderr)
            continue
        row = {"torch": torch_version, "Python": python, "operators": "?"}
        for name, code in CELLS.items():
            row[name], said = cell(executable, package, code)
            if name == "import" and said:
                row["operators"], row["torch"] = said.split()
            if name in ("compile", "cases", "kernel") and said:
                row[name] += f", {said}"
        print(json.dumps(row), flush=True)
        yield row


def table(results: list[dict[str, str]]) -> str:
    lines = [
        "# What runs where",
        "",
        "Written by `make test-matrix`: one wheel on every row, each cell a fresh process with",
        "its time, on the CPU. `operators` says whether the compiled operators served the row",
        "(torch 2.10 and newer) or those in Python. `cases` are those of `anyflash.testing`,",
        "forward and backward; `around` is rotary, norm, cross entropy and the MLP; `kernel` is",
        "the instruction set of the kernels that fp32 and bf16 attention ran on.",
        "",
        "| " + " | ".join(results[0]) + " |",
        "|" + "---|" * len(results[0]),
        *("| " + " | ".join(row.values()) + " |" for row in results),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="anyflash on old and new torch and Python")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="TORCH", help="leaves the table alone"
    )
    only = parser.parse_args().only
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = list(rows(only))
    if results and not only:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table(results))
    failed = any("failed" in text for row in results for text in row.values())
    return int(failed or not results)


if __name__ == "__main__":
    sys.exit(main())

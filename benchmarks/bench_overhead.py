"""What a call costs beside its arithmetic: tiny CPU tensors, one thread, microseconds."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator

import torch
from benchmarks.measure import Row, interleaved
from flash_attn import flash_attn_func
from torch.nn.functional import scaled_dot_product_attention

NUMBER = 500
TWIN = pathlib.Path(__file__).parent / "unboxed_twin.cpp"


def rows() -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _over_the_aten_op()
        yield from _over_an_unboxed_op()
        yield from _compiled()
    finally:
        torch.set_num_threads(threads)


def _over_the_aten_op() -> Iterator[Row]:
    aten = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    plain = [torch.randn(1, 1, 1, 8) for _ in range(3)]
    graded = [t.clone().requires_grad_() for t in plain]
    dout = torch.randn(1, 1, 1, 8)

    forward = interleaved(
        lambda: flash_attn_func(*plain, causal=True),
        lambda: aten(*plain, 0.0, True),
        number=NUMBER,
    )
    yield Row.excess(
        "flash_attn_func over the aten op, tiny, forward (us)",
        *(1e6 * t for t in forward),
        at_most=15,
        unit="us",
    )
    both = interleaved(
        lambda: torch.autograd.grad(flash_attn_func(*graded, causal=True), graded, dout),
        lambda: torch.autograd.grad(aten(*graded, 0.0, True)[0], graded, dout),
        number=NUMBER,
    )
    yield Row.excess(
        "flash_attn_func over the aten op, tiny, forward+backward (us)",
        *(1e6 * t for t in both),
        at_most=60,
        unit="us",
    )


def _over_an_unboxed_op() -> Iterator[Row]:
    """_flash_attn_forward by one aten call, against an unboxed operator of that call alone."""
    twin = _build_twin()
    ours = torch.ops.anyflash._flash_attn_forward.default
    aten_cpu = 7  # as an order of back ends
    rest = (None, None, 1, 1, *[None] * 7, 0.0, 0.35, True, -1, -1, 0.0, False, True, aten_cpu)
    with torch.inference_mode():  # beneath the autograd kernel, which only ours has
        q, k, v = (torch.randn(1, 1, 1, 8) for _ in range(3))
        times = interleaved(
            lambda: ours(q, k, v, *rest), lambda: twin(q, k, v, *rest), number=NUMBER
        )
    yield Row.excess(
        "the operator over an unboxed one, tiny, forward (us)",
        *(1e6 * t for t in times),
        at_most=2,
        unit="us",
    )


def _compiled() -> Iterator[Row]:
    """A compiled call beside a compiled one of PyTorch's own attention, and beside eager mode."""
    ours = torch.compile(flash_attn_func, fullgraph=True)
    sdpa = torch.compile(scaled_dot_product_attention, fullgraph=True)
    plain = [torch.randn(1, 1, 1, 8) for _ in range(3)]
    graded = [t.clone().requires_grad_() for t in plain]
    dout = torch.randn(1, 1, 1, 8)

    def both(function: Callable[..., torch.Tensor], **options: bool) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*graded, **options), graded, dout)

    calls = {
        "forward": (
            lambda: ours(*plain, causal=True),
            lambda: sdpa(*plain, is_causal=True),
            lambda: flash_attn_func(*plain, causal=True),
        ),
        "forward+backward": (
            both(ours, causal=True),
            both(sdpa, is_causal=True),
            both(flash_attn_func, causal=True),
        ),
    }
    for what, functions in calls.items():
        compiled, reference, eager = (1e6 * t for t in interleaved(*functions, number=NUMBER))
        name = f"compiled flash_attn_func, tiny, {what} (us)"
        yield Row.part(f"{name}, beside compiled SDPA", compiled, reference, at_most=1.0)
        yield Row.part(f"{name}, beside eager", compiled, eager, at_most=2.0)


def _build_twin() -> torch._ops.OpOverload:
    """Compiles the twin against the running torch (about half a minute) and loads it."""
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler for the unboxed twin")
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-w"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    flags += [f"-I{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/unboxed_twin.so"
        links = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
        subprocess.run([compiler, *flags, str(TWIN), "-o", library, *links], check=True)
        torch.ops.load_library(library)
    return torch.ops.anyflash_bench._flash_attn_forward.default

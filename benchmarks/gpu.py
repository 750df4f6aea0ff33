"""Times the routes on this GPU against each other and against plain SDPA; writes bench.json.

python -m benchmarks.gpu --out FOLDER

Medians of CUDA events around single calls on random data; some shapes exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from typing import Any, Callable

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_func

import anyflash

ROUTES = ("aten_flash", "aten_efficient", "aten_cudnn", "math")

# (batch, heads, heads_k, seqlen, head_dim, causal, dtype)
SHAPES = (
    (4, 16, 16, 2048, 64, True, torch.bfloat16),
    (4, 16, 16, 2048, 128, True, torch.bfloat16),
    (2, 16, 16, 4096, 128, False, torch.bfloat16),
    (1, 32, 8, 8192, 128, True, torch.bfloat16),
    (4, 16, 16, 1024, 64, False, torch.float32),
    (32, 8, 8, 128, 64, False, torch.float16),
)


def median_us(function: Callable[[], Any], rounds: int = 20) -> float:
    """Median microseconds on the GPU of one call."""
    for _ in range(3):
        function()
    pairs = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(1e3 * begin.elapsed_time(end) for begin, end in pairs)


def both_directions(
    attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> tuple[float, float]:
    """Microseconds of (forward without gradients, forward + backward)."""
    dout = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)

    def step() -> None:
        torch.autograd.grad(attend(*inputs), inputs, dout)

    return median_us(forward), median_us(step)


def attention_rows(shape: tuple[Any, ...]) -> list[dict[str, Any]]:
    """One row per route that accepts the shape, and one for SDPA."""
    batch, heads, heads_k, seqlen, head_dim, causal, dtype = shape
    label = f"{str(dtype)[6:]} b{batch} h{heads}/{heads_k} s{seqlen} d{head_dim}"
    label += " causal" if causal else ""
    options = {"device": "cuda", "dtype": dtype, "requires_grad": True}
    q = torch.randn(batch, seqlen, heads, head_dim, **options)
    k, v = (torch.randn(batch, seqlen, heads_k, head_dim, **options) for _ in range(2))

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = {"enable_gqa": True} if heads != heads_k else {}
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **grouped).transpose(1, 2)

    rows = [row(label, "SDPA", *both_directions(sdpa, [q, k, v]))]
    for route in ROUTES:
        with anyflash.backend(route):
            try:
                times = both_directions(lambda *t: flash_attn_func(*t, causal=causal), [q, k, v])
            except RuntimeError as error:
                rows.append({"shape": label, "route": route, "refused": str(error)})
                continue
        rows.append(row(label, route, *times))
    return rows


def row(shape: str, route: str, forward: float, both: float) -> dict[str, Any]:
    return {"shape": shape, "route": route, "forward_us": forward, "forward_backward_us": both}


def bias_activation_rows() -> list[dict[str, Any]]:
    """The kernel and plain PyTorch on a (tokens, hidden) that exceeds the L2 cache."""
    x = torch.randn(16384, 16384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(16384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rows = []
    for route in ("kernel", "math"):

        def activate(x: torch.Tensor, bias: torch.Tensor, route: str = route) -> torch.Tensor:
            return anyflash.bias_activation(x, bias, activation="gelu_tanh", backend=route)

        forward, both = both_directions(activate, [x, bias])
        gigabytes = 2 * x.numel() * x.element_size() / 1e9
        rate = {"forward_gb_per_s": gigabytes / (forward * 1e-6)}
        rows.append({**row("bias + gelu_tanh bfloat16 16384x16384", route, forward, both), **rate})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for bench.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that torch can use", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    rows = [entry for shape in SHAPES for entry in attention_rows(shape)]
    rows += bias_activation_rows()
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    (options.out / "bench.json").write_text(json.dumps(facts, indent=2) + "\n")
    for entry in rows:
        times = (
            entry.get("refused")
            or f"{entry['forward_us']:9.1f} {entry['forward_backward_us']:9.1f} us"
        )
        print(f"{entry['shape']:45s} {entry['route']:15s} {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

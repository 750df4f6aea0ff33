"""Ulysses: each process has some rows of every sequence, and computes attention of some heads.

torchrun --nproc-per-node 2 ulysses.py
"""

import os

import torch
import torch.distributed as dist
from flash_attn import flash_attn_func
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

ROWS, HEADS = Shard(1), Shard(2)  # of (batch, seqlen, heads, head_dim)


def ulysses(q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh) -> Tensor:
    """Causal attention of this process's rows, (batch, seqlen / processes, heads, head_dim), to all
    rows. The processes exchange rows for heads, and back; so do the gradients."""
    by_rows = (DTensor.from_local(x, mesh, [ROWS]) for x in (q, k, v))
    by_heads = (x.redistribute(placements=[HEADS]) for x in by_rows)
    out = flash_attn_func(*by_heads, causal=True)
    return out.redistribute(placements=[ROWS]).to_local()


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))

    def mine(x: Tensor) -> Tensor:
        return x.detach().chunk(mesh.size(), dim=1)[mesh.get_local_rank()].clone()

    torch.manual_seed(0)  # the same on all processes
    dtype, tolerance = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
    heads = (8, 4, 4)  # grouped: two heads of q share one of k and v
    whole = [torch.randn(2, 512, h, 64).to(device, dtype).requires_grad_() for h in heads]
    parts = [mine(x).requires_grad_() for x in whole]

    out = ulysses(*parts, mesh)
    out.square().sum().backward()

    expected = flash_attn_func(*whole, causal=True)
    expected.square().sum().backward()
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(parts, whole))]
    for part, x in pairs:
        torch.testing.assert_close(part, mine(x), rtol=tolerance, atol=tolerance)
    if mesh.get_rank() == 0:
        print(f"Ulysses on {mesh.size()} processes: output and gradients as of one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

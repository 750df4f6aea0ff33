"""Ring attention: each process has a part of every sequence, and keys and values go round.

torchrun --nproc-per-node 2 ring.py
"""

import os

import torch
import torch.distributed as dist
from flash_attn import flash_attn_func
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))

    torch.manual_seed(0)  # the same on all processes
    dtype, tolerance = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
    heads = (8, 4, 4)  # grouped: two heads of q share one of k and v
    q, k, v = (torch.randn(2, 512, h, 64).to(device, dtype) for h in heads)

    def step() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = flash_attn_func(*leaves, causal=True)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in leaves)]

    expected = step()
    # Inside, the buffers are this process's rows: some from the beginning of the sequence and as
    # many from its end, so that all have the same number of keys to look at.
    buffers = [q, k, v, *expected]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers)):
        for part, x in zip(step(), expected):
            torch.testing.assert_close(part, x, rtol=tolerance, atol=tolerance)
    if mesh.get_rank() == 0:
        print(f"Ring on {mesh.size()} processes: output and gradients as of one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What a program on several processes does with anyflash: the examples, the README's paragraph, and
training with DDP and FSDP2. Two gloo processes."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.nn.functional as F
from flash_attn import flash_attn_qkvpacked_func
from gloo import run_processes
from packaging.version import Version
from torch import nn
from torch.utils.checkpoint import checkpoint
from tree import REPOSITORY

import anyflash

SIZE = 2
VOCAB, WIDTH, HEADS, STEPS = 19, 32, 4, 30
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


class Block(nn.Module):
    """Attention and an MLP of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(anyflash.rms_norm(x, self.norm1)).unflatten(-1, (3, HEADS, -1))
        x = x + self.out(flash_attn_qkvpacked_func(qkv, causal=True).flatten(-2))
        linears = (self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        return x + anyflash.fused_mlp(anyflash.rms_norm(x, self.norm2), *linears)


class Model(nn.Module):
    """Its blocks are computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def _model() -> Model:
    torch.manual_seed(0)
    return Model()


def _train(model: nn.Module, part: slice) -> list[float]:
    """The losses of a part of the batch: of the next token in sequences that count up."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    starts = torch.arange(8).unsqueeze(1)
    losses = []
    for step in range(STEPS):
        tokens = ((starts + step + torch.arange(13)) % VOCAB)[part]
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _mean(losses: list[float]) -> list[float]:
    """Over the processes, whose parts of the batch are equal."""
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    return (mean / SIZE).tolist()


def _part(rank: int) -> slice:
    return slice(4 * rank, 4 * (rank + 1))


def _ddp(rank: int) -> list[float]:
    model = nn.parallel.DistributedDataParallel(_model())
    return _mean(_train(model, _part(rank)))


def _fsdp2(rank: int) -> list[float]:
    from torch.distributed.fsdp import fully_shard

    model = _model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _mean(_train(model, _part(rank)))


def _train_on(rank: int) -> dict[str, list[float]]:
    ways = {"ddp": _ddp}
    if hasattr(torch.distributed.fsdp, "fully_shard"):  # torch 2.6
        ways["fsdp2"] = _fsdp2
    return {name: way(rank) for name, way in ways.items()}


def test_training_is_that_of_one_process(tmp_path):
    of_ranks = run_processes(_train_on, tmp_path, count=SIZE)
    expected = _train(_model(), slice(None))
    assert expected[-1] < 0.5 * expected[0]
    for found in (losses for ways in of_ranks for losses in ways.values()):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _run_programs(rank: int, programs: dict[str, str]) -> None:
    """Programs for torchrun, in a group that is there already, and ends with the test."""
    os.environ["WORLD_SIZE"] = str(SIZE)
    dist.destroy_process_group = lambda: None
    for name, code in programs.items():
        exec(compile(code, name, "exec"), {"__name__": "__main__"})


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="anyflash knows the ring of torch 2.13"
)
def test_the_examples_and_the_paragraph_of_the_readme(tmp_path):
    paths = [f"examples/distributed/{name}.py" for name in ("ulysses", "ring")]
    programs = {path: (REPOSITORY / path).read_text() for path in paths}
    (programs["README.md"],) = re.findall(
        r"### Several GPUs\n.*?```python\n(.*?)```",
        (REPOSITORY / "README.md").read_text(),
        re.DOTALL,
    )
    run_processes(_run_programs, tmp_path, programs, count=SIZE)

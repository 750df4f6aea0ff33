"""Processes that form one group of torch.distributed, for tests of parallel layers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def _member(
    rank: int, worker: Callable[..., Any], folder: str, count: int, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )
    torch.save(worker(rank, *arguments), f"{folder}/returned{rank}")
    # Nobody leaves while another still listens. And nobody runs the destructors of gloo's threads,
    # which end one process in ten by an abort (seen with torch 2.13).
    Path(folder, f"done{rank}").touch()
    while not all(Path(folder, f"done{other}").exists() for other in range(count)):
        time.sleep(0.01)
    os._exit(0)


def run_processes(
    worker: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2
) -> list[Any]:
    """What ``worker(rank, *arguments)`` returns in each process of one gloo group, which meet in a
    folder that only they use; raises what one of them raised."""
    torch.multiprocessing.spawn(_member, (worker, str(folder), count, arguments), nprocs=count)
    return [torch.load(folder / f"returned{rank}", weights_only=False) for rank in range(count)]

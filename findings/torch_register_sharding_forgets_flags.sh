#!/usr/bin/env bash
# torch 2.13.0: DTensor gives a call of a custom operator the sharding of an earlier call that had another flag.
#
# torch.distributed.tensor.experimental.register_sharding asks a function how a call may be sharded and remembers the answer, by the shapes
# of the tensors and by all arguments from the first int on. A bool before it, or in an operator without ints, is not looked at, though the
# function gets it. Here the flag decides whether rows may be shards or not: alone, a call with the flag gathers; after one without it, it
# keeps the shards.
#
#   flag alone              Replicate()
#   no flag                 Shard(dim=0)
#   flag after no flag      Shard(dim=0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 numpy
cat > "$folder/program.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding

store = f"file://{sys.argv[1]}"
dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))


@torch.library.custom_op("demo::scale", mutates_args=())
def scale(x: torch.Tensor, by_maximum: bool) -> torch.Tensor:
    return x / x.max() if by_maximum else 2 * x


@scale.register_fake
def _(x, by_maximum):
    return torch.empty_like(x)


@register_sharding(torch.ops.demo.scale.default)
def _(x, by_maximum):
    whole = ([Replicate()], [Replicate(), None])
    return [whole] if by_maximum else [([Shard(0)], [Shard(0), None]), whole]


def show(what, rows, by_maximum):
    x = distribute_tensor(torch.ones(rows, 2), mesh, [Shard(0)])
    print(f"{what:23s} {scale(x, by_maximum).placements[0]!r}", flush=True)


show("flag alone", 6, True)
show("no flag", 4, False)
show("flag after no flag", 4, True)
PY
"$folder/venv/bin/python" "$folder/program.py" "$folder/store" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
flag alone              Replicate()
no flag                 Shard(dim=0)
flag after no flag      Shard(dim=0)
SEEN

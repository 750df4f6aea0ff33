#!/usr/bin/env bash
# torch 2.15.0 (2.13.0 alike), CPU: with activation_memory_budget below 1, the backward of a compiled dropout uses a new mask.
#
# torch._functorch.config.activation_memory_budget lets the partitioner recompute activations instead of saving them. It
# also recomputes F.dropout, and draws again: the gradient reaches positions that the forward dropped and misses others, as
# if forward and backward were two different calls. No warning; a budget of 1 (the default) is right. Below, w is the
# identity, so an input's gradient is nonzero exactly where dropout kept it.
#
#   budget 1.0: gradient where the forward kept, True
#   budget 0.5: gradient where the forward kept, False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.15.0
cat > "$folder/program.py" <<'PY'
import sys

import torch
import torch._functorch.config

budget = torch._functorch.config.activation_memory_budget = float(sys.argv[1])
torch.manual_seed(0)
x = torch.ones(64, 64, requires_grad=True)
w = torch.eye(64, requires_grad=True)


@torch.compile(fullgraph=True)
def layer(x, w):
    return torch.sin(torch.nn.functional.dropout(x, 0.5, True) @ w)


out = layer(x, w)
out.sum().backward()
alike = torch.equal(out.detach() != 0, x.grad != 0)
print(f"budget {budget}: gradient where the forward kept, {alike}")
PY
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
for budget in 1 0.5; do "$folder/venv/bin/python" "$folder/program.py" "$budget" 2> /dev/null; done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
budget 1.0: gradient where the forward kept, True
budget 0.5: gradient where the forward kept, False
SEEN

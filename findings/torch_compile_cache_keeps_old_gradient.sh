#!/usr/bin/env bash
# torch 2.15.0 (2.13.0 alike): torch.compile's cache on disk does not see what is registered under an operator's name.
#
# A custom operator gets its derivative by torch.library.register_autograd. A program compiles a function around it, then
# the formula is corrected (here: the factor 2 becomes 5) and the program runs again, in a new process, with the same
# cache folder. Eager mode uses the new formula; the compiled function goes on using the old one, without a warning.
# The same holds for a changed fake kernel. Whoever ships an operator must change its name or schema with its formula.
#
#   factor 2.0: eager [2.0, 2.0, 2.0] compiled [2.0, 2.0, 2.0]
#   factor 5.0: eager [5.0, 5.0, 5.0] compiled [2.0, 2.0, 2.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.15.0
cat > "$folder/program.py" <<'PY'
import sys

import torch

factor = float(sys.argv[1])
library = torch.library.Library("finding", "DEF")
library.define("scale(Tensor x) -> Tensor")
library.impl("scale", lambda x: x * 2, "CPU")
torch.library.register_fake("finding::scale", lambda x: torch.empty_like(x), lib=library)
torch.library.register_autograd("finding::scale", lambda ctx, g: g * factor, lib=library)


def loss(x):
    return torch.ops.finding.scale(x).sum()


gradients = []
for function in (loss, torch.compile(loss, fullgraph=True)):
    x = torch.ones(3, requires_grad=True)
    function(x).backward()
    gradients.append(x.grad.tolist())
print(f"factor {factor}: eager {gradients[0]} compiled {gradients[1]}")
PY
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
for factor in 2 5; do "$folder/venv/bin/python" "$folder/program.py" "$factor" 2> /dev/null; done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
factor 2.0: eager [2.0, 2.0, 2.0] compiled [2.0, 2.0, 2.0]
factor 5.0: eager [5.0, 5.0, 5.0] compiled [2.0, 2.0, 2.0]
SEEN

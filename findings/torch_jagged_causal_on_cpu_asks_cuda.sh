#!/usr/bin/env bash
# torch 2.13.0, on a machine without a GPU: scaled_dot_product_attention of jagged nested tensors in CPU memory
# fails with an error of CUDA's driver as soon as it is causal.
#
# What is not causal is computed, in plain operations. For the causal call, back ends are tried in turn, and after those that
# a CPU cannot have, cuDNN's is asked whether it can take tensors that are on the CPU; it looks for a GPU first. A build
# without CUDA would say, by its code, that there is no viable back end. One would expect the math back
# end, as for dense tensors, or that refusal.
#
#   jagged, full    off by 0
#   jagged, causal  AcceleratorError: CUDA error
#   dense, causal   computed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - 2> /dev/null <<'PY' | tee "$folder/seen"
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

sequences = [torch.randn(n, 2, 8) for n in (3, 5)]
x = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)
wanted = [attend(*[s.transpose(0, 1)] * 3) for s in sequences]
found = attend(x, x, x).unbind()
print(f"jagged, full    off by {max((a - b).abs().max().item() for a, b in zip(found, wanted)):.0f}")
try:
    attend(x, x, x, is_causal=True)
except RuntimeError as error:
    print(f"jagged, causal  {type(error).__name__}: {str(error)[:10]}")
dense = torch.randn(2, 2, 5, 8)
attend(dense, dense, dense, is_causal=True)
print("dense, causal   computed")
PY
diff "$folder/seen" - <<'SEEN'
jagged, full    off by 0
jagged, causal  AcceleratorError: CUDA error
dense, causal   computed
SEEN

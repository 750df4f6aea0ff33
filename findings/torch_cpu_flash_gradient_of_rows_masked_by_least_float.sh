#!/usr/bin/env bash
# torch 2.13.0: with a mask of the least float in a whole row, scaled_dot_product_attention on a CPU has the right output and gradients
# that are too large by the number of keys.
#
# Masks are often written with torch.finfo(dtype).min or -1e9 instead of -inf, so that a row without any visible key (a padding token)
# is an average instead of NaN. That works in the forward: the flash routine and the math routine agree. The backward of the flash routine
# makes the probabilities again from the log-sum-exp, one float: beside -3.4e38, or -1e9, the logarithm of the number of keys is lost, and
# every key gets the probability 1 instead of 1 / keys. No warning, and gradcheck with small masks passes. With -1e5 the gradients are right.
#
# Seen on 30 November 2026, x86_64 Linux, Python 3.11, float32, 8 keys; the gradient of v in the masked row, by keys:
#   mask -3.4e+38: outputs equal True, gradient 8.00 times that of the math routine
#   mask -1e+09: outputs equal True, gradient 8.00 times that of the math routine
#   mask -1e+05: outputs equal True, gradient 1.00 times that of the math routine
#
# Exits 0 while this is so, 1 when it changes, 2 when the packages cannot be installed. No GPU needed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 || exit 2
cat > "$folder/program.py" <<'END'
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
KEYS = 8
q, k, v = (torch.randn(1, 1, KEYS, 16, requires_grad=True) for _ in range(3))
ROW = 3  # without a visible key
only_that_row = torch.zeros(1, 1, KEYS, 16)
only_that_row[:, :, ROW] = torch.randn(16)
lines = []
for value in (torch.finfo(torch.float32).min, -1e9, -1e5):
    mask = torch.zeros(KEYS, KEYS)
    mask[ROW] = value
    results = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        results.append((out, *torch.autograd.grad(out, v, only_that_row)))
    (flash, flash_dv), (math, math_dv) = results
    times = (flash_dv / math_dv).median().item()
    equal = torch.allclose(flash, math, atol=1e-5)
    lines.append(f"mask {value:.2g}: outputs equal {equal}, gradient {times:.2f} times that of the math routine")
print("\n".join(lines))
END
expected="mask -3.4e+38: outputs equal True, gradient 8.00 times that of the math routine
mask -1e+09: outputs equal True, gradient 8.00 times that of the math routine
mask -1e+05: outputs equal True, gradient 1.00 times that of the math routine"
seen="$("$folder/venv/bin/python" "$folder/program.py")"
echo "$seen"
[[ "$seen" == "$expected" ]]

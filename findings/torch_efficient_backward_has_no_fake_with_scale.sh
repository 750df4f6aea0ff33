#!/usr/bin/env bash
# torch 2.15.0 (2.13.0 alike): the fake of aten._efficient_attention_backward takes other arguments than the operator.
#
# It lacks `out`, the sixth, and `window_size`, so what stands behind `bias` is one place off. A call without a scale gets an
# answer all the same; one with a scale, which the operator has, is a TypeError: on meta tensors, under FakeTensorMode, and
# so wherever torch.compile traces it.
#
#   no scale: 4 results
#   scale: TypeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.15.0
cat > "$folder/program.py" <<'PY'
import torch

aten = torch.ops.aten
q = torch.empty(1, 8, 2, 16, dtype=torch.float16, device="meta")  # batch, rows, heads, head_dim


def backward(**scale):
    forward = aten._efficient_attention_forward(
        q, q, q, None, None, None, None, None, 0.0, 0, True, **scale
    )
    out, lse, seed, offset, *_ = forward
    return aten._efficient_attention_backward(
        out, q, q, q, None, out, None, None, 8, 8, lse, 0.0, seed, offset, 0, False, **scale
    )


for name, scale in (("no scale", {}), ("scale", {"scale": 0.5})):
    try:
        print(f"{name}: {len(backward(**scale))} results")
    except TypeError as error:
        print(f"{name}: {type(error).__name__}")
PY
"$folder/venv/bin/python" "$folder/program.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
no scale: 4 results
scale: TypeError
SEEN

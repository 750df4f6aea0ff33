#!/usr/bin/env bash
# openvino 2026.4.1: ScaledDotProductAttention of one query with a mask is NaN or 1e38, in the default configuration on a CPU with bf16.
#
# One new token against cached keys, with the additive mask that hides padding; float32 tensors, two heads or more, and the mask in a shape that
# the operator broadcasts: (1, keys) or (1, 1, 1, keys). A mask of zeros is enough, so is causal=True. On a CPU with bf16 instructions the default
# is to compute in bf16, and there the result is garbage, another one in every run. Two queries are right, one query without a mask is right, so
# is a mask written out for every head, and INFERENCE_PRECISION_HINT=f32.
#
#   one query, no mask: right
#   one query, mask (1, 16): wrong
#   one query, mask (1, 1, 1, 16): wrong
#   one query, mask (1, 2, 1, 16): right
#   two queries, mask (2, 16): right
#   one query, mask (1, 16), f32: right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q numpy==2.2.6 openvino==2026.4.1
cat > "$folder/program.py" <<'PY'
import numpy as np
import openvino as ov
from openvino import opset13 as ops

HEADS, KEYS, DIM = 2, 16, 64
NAMES = {1: "one query", 2: "two queries"}
core = ov.Core()


def show(queries, mask, **options):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, HEADS, n, DIM), np.float32) for n in (queries, KEYS, KEYS))
    inputs = [q, k, v] + ([np.zeros(mask, np.float32)] if mask else [])
    parameters = [ops.parameter(list(x.shape), np.float32) for x in inputs]
    attention = ops.scaled_dot_product_attention(*parameters, causal=False)
    model = ov.Model([ops.result(attention)], parameters, "attention")
    found = core.compile_model(model, "CPU", options)(inputs)[0]
    scores = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(DIM))
    expected = scores / scores.sum(-1, keepdims=True) @ v
    right = np.abs(found - expected).max() < 0.1  # False for NaN
    names = [NAMES[queries], f"mask {mask}" if mask else "no mask", *options.values()]
    print(f"{', '.join(names)}: {'right' if right else 'wrong'}")


if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    show(1, None)
    show(1, (1, KEYS))
    show(1, (1, 1, 1, KEYS))
    show(1, (1, HEADS, 1, KEYS))
    show(2, (2, KEYS))
    show(1, (1, KEYS), INFERENCE_PRECISION_HINT="f32")
else:
    print("no bf16 on this CPU")
PY
seen=$("$folder/venv/bin/python" "$folder/program.py")
echo "$seen"
[ "$seen" = "one query, no mask: right
one query, mask (1, 16): wrong
one query, mask (1, 1, 1, 16): wrong
one query, mask (1, 2, 1, 16): right
two queries, mask (2, 16): right
one query, mask (1, 16), f32: right" ] || [ "$seen" = "no bf16 on this CPU" ]

#!/usr/bin/env bash
# torch 2.15.0 (2.13.0 alike): forward mode through a custom operator with register_autograd gives zeros.
#
# The operator computes x * x and has a right reverse-mode formula. It has no forward-mode one, so one would expect
# torch.func.jvp to refuse it ("forward AD not implemented", as an autograd.Function without jvp does). It answers with a
# tangent of zeros, torch.func.jacfwd with a matrix of zeros; torch.func.grad does refuse, about setup_context.
#
#   x * x                   jvp [8.0, 8.0, 8.0]
#   finding::square         jvp [0.0, 0.0, 0.0]
#   finding::square         jacfwd [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
#   finding::square         backward [8.0, 8.0, 8.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.15.0
"$folder/venv/bin/python" - 2> /dev/null <<'PY' | tee "$folder/seen"
import torch


def remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


library = torch.library.Library("finding", "DEF")
library.define("square(Tensor x) -> Tensor")
library.impl("square", lambda x: x * x, "CPU")
torch.library.register_fake("finding::square", lambda x: torch.empty_like(x), lib=library)
torch.library.register_autograd(
    "finding::square",
    lambda ctx, g: 2 * g * ctx.saved_tensors[0],
    setup_context=remember,
    lib=library,
)
square = torch.ops.finding.square
x, tangent = torch.full((3,), 4.0), torch.ones(3)
print("x * x                   jvp", torch.func.jvp(lambda x: x * x, (x,), (tangent,))[1].tolist())
print("finding::square         jvp", torch.func.jvp(square, (x,), (tangent,))[1].tolist())
print("finding::square         jacfwd", torch.func.jacfwd(square)(x).tolist())
x.requires_grad_()
square(x).sum().backward()
print("finding::square         backward", x.grad.tolist())
PY
diff "$folder/seen" - <<'SEEN'
x * x                   jvp [8.0, 8.0, 8.0]
finding::square         jvp [0.0, 0.0, 0.0]
finding::square         jacfwd [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
finding::square         backward [8.0, 8.0, 8.0]
SEEN

#!/usr/bin/env bash
# torch 2.13.0: autograd.grad(create_graph=True) inside a compiled function forgets the second derivative of every autograd.Function.
#
# With torch._dynamo.config.trace_autograd_ops, torch.compile keeps a call of torch.autograd.grad in the graph. A gradient penalty written
# that way is right for PyTorch's operators. Where the gradient went through a torch.autograd.Function, with a backward that can be
# differentiated, the penalty's own gradient is zero, without an error or a warning; eager mode has it. Here x^3, whose penalty
# sum((3 x^2)^2) has the gradient 36 x^3.
#
#   operator eager          [36.0, 288.0]
#   operator compiled       [36.0, 288.0]
#   Function eager          [36.0, 288.0]
#   Function compiled       [0.0, 0.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0
"$folder/venv/bin/python" - 2> /dev/null <<'PY' | tee "$folder/seen"
import torch


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


def penalty_of(cube):
    def penalty(x):
        (first,) = torch.autograd.grad(cube(x).sum(), x, create_graph=True)
        return first.square().sum() + 0 * x.sum()

    return penalty


torch._dynamo.config.trace_autograd_ops = True
for name, cube in (("operator", lambda x: x**3), ("Function", Cube.apply)):
    penalty = penalty_of(cube)
    for mode, function in (
        ("eager", penalty),
        ("compiled", torch.compile(penalty, backend="aot_eager", fullgraph=True)),
    ):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        (second,) = torch.autograd.grad(function(x), x)
        print(f"{name + ' ' + mode:23s} {second.tolist()}")
PY
diff "$folder/seen" - <<'SEEN'
operator eager          [36.0, 288.0]
operator compiled       [36.0, 288.0]
Function eager          [36.0, 288.0]
Function compiled       [0.0, 0.0]
SEEN

#!/usr/bin/env bash
# torch 2.15.0 (2.13.0 alike): make_fx(f, pre_dispatch=True) of a gradient is wrong for every x but the one of tracing.
#
# f computes the gradient of sum(x * exp(x)) with torch.autograd.grad: (1 + x) exp(x). The derivative of exp uses exp's own
# result, which autograd kept. One would expect the graph to take the exp(x) that it has. It holds the exp(x) of tracing as
# a constant, _tensor_constant0, and no error tells. So it is for log_softmax, softmax, tanh, sigmoid, sqrt and whatever
# else keeps its result. Through torch.func.grad all of the gradient is a constant. Without pre_dispatch it is right.
# (torch.export, which traces this way, does refuse: "a fake tensor in the exported program constant's list".)
#
#   eager                             at 1 [5.44]  at 2 [22.17]
#   make_fx                           at 1 [5.44]  at 2 [22.17]
#   make_fx, pre_dispatch             at 1 [5.44]  at 2 [12.83]
#   the same of torch.func.grad       at 1 [5.44]  at 2 [5.44]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.15.0
"$folder/venv/bin/python" - 2> /dev/null <<'PY' | tee "$folder/seen"
import torch
from torch.fx.experimental.proxy_tensor import make_fx


def loss(x):
    return (x * x.exp()).sum()


def gradient(x):
    return torch.autograd.grad(loss(x), x)[0]


def show(name, function):
    at = [[round(v, 2) for v in function(x).tolist()] for x in (one, two)]
    print(f"{name:32s}  at 1 {at[0]}  at 2 {at[1]}")


one, two = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
show("eager", gradient)
show("make_fx", make_fx(gradient)(one))
show("make_fx, pre_dispatch", make_fx(gradient, pre_dispatch=True)(one))
show("the same of torch.func.grad", make_fx(torch.func.grad(loss), pre_dispatch=True)(one))
PY
diff "$folder/seen" - <<'SEEN'
eager                             at 1 [5.44]  at 2 [22.17]
make_fx                           at 1 [5.44]  at 2 [22.17]
make_fx, pre_dispatch             at 1 [5.44]  at 2 [12.83]
the same of torch.func.grad       at 1 [5.44]  at 2 [5.44]
SEEN

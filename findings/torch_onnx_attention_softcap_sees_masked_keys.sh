#!/usr/bin/env bash
# torch 2.15.0 (2.13.0 alike), CPU: torch.onnx.ops.attention with a mask and a softcap attends to the keys that the mask hides.
#
# The mask's -inf is added to the scores before softcap * tanh(scores / softcap), which makes -softcap of it: a key that is
# hidden weighs exp(-softcap), not 0. Exported, the same module is right in onnxruntime 1.32.0. So a model written with
# PyTorch's own ONNX operator lets every token see its future in PyTorch, and not where it is deployed. Row 0 of a causal
# mask sees key 0 alone, so its output is value 0.
#
#   PyTorch, no softcap: row 0 is value 0, True
#   PyTorch, softcap 2: row 0 is value 0, False
#   onnxruntime, softcap 2: row 0 is value 0, True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.15.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat > "$folder/program.py" <<'PY'
import onnxruntime
import torch


class Attention(torch.nn.Module):
    def __init__(self, softcap):
        super().__init__()
        self.softcap = softcap

    def forward(self, q, k, v, mask):
        return torch.onnx.ops.attention(q, k, v, attn_mask=mask, softcap=self.softcap)[0]


torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 4, 8) for _ in "qkv")
mask = torch.ones(4, 4, dtype=torch.bool).tril()


def tell(where, out):
    print(f"{where}: row 0 is value 0, {torch.allclose(out[0, 0, 0], v[0, 0, 0])}")


tell("PyTorch, no softcap", Attention(0.0)(q, k, v, mask))
tell("PyTorch, softcap 2", Attention(2.0)(q, k, v, mask))
program = torch.onnx.export(
    Attention(2.0), (q, k, v, mask), dynamo=True, opset_version=23, verbose=False
)
session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
names = (x.name for x in session.get_inputs())
given = {name: x.numpy() for name, x in zip(names, (q, k, v, mask))}
tell("onnxruntime, softcap 2", torch.from_numpy(session.run(None, given)[0]))
PY
"$folder/venv/bin/python" "$folder/program.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
PyTorch, no softcap: row 0 is value 0, True
PyTorch, softcap 2: row 0 is value 0, False
onnxruntime, softcap 2: row 0 is value 0, True
SEEN

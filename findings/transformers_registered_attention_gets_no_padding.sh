#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.15.0: an attention function of one's own never hears of padding; a name with "flash" in it
# cannot be used.
#
# AttentionInterface.register(name, function) is the documented way to bring an attention function. The function has an
# argument attention_mask, as the built-in "sdpa" has. Under a registered name it is None even where the batch is padded:
# the padding is attended to and the logits are wrong, without a warning. Masks are made only for names that were registered
# a second time, with AttentionMaskInterface.
# If the name contains "flash", register() accepts it too, but making a model then fails: the name is taken for a kernel to
# be fetched from a hub.
#
#   sdpa              padding changes the logits: False
#   own               padding changes the logits: True  (masks seen: [None])
#   own and own mask  padding changes the logits: False  (masks seen: [(1, 1, 11, 11)])
#   own_flash         ValueError: Could not find the currently requested flash attention implementation at `own_flash`
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.15.0 transformers==5.24.0
"$folder/venv/bin/python" - 2> /dev/null <<'PY' | tee "$folder/seen"
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

seen = []


def attend(module, q, k, v, attention_mask, scaling=None, dropout=0.0, **kwargs):
    seen.append(None if attention_mask is None else tuple(attention_mask.shape))
    causal = attention_mask is None
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask, is_causal=causal, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


tokens = torch.arange(1, 9)[None]
padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
mask = (padded != 0).long()
positions = (mask.cumsum(-1) - 1).clamp(min=0)


def padding_changes_logits(name):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=50, attn_implementation=name,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        alone = model(tokens).logits
        seen.clear()
        in_batch = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    return not torch.allclose(alone, in_batch, atol=1e-5)


print("sdpa              padding changes the logits:", padding_changes_logits("sdpa"))
AttentionInterface.register("own", attend)
print("own               padding changes the logits:", padding_changes_logits("own"), f" (masks seen: {seen})")
AttentionMaskInterface.register("own", sdpa_mask)
print("own and own mask  padding changes the logits:", padding_changes_logits("own"), f" (masks seen: {seen})")
AttentionInterface.register("own_flash", attend)
try:
    padding_changes_logits("own_flash")
except Exception as error:
    print("own_flash        ", f"{type(error).__name__}: {str(error).partition('.')[0]}")
PY
diff "$folder/seen" - <<'SEEN'
sdpa              padding changes the logits: False
own               padding changes the logits: True  (masks seen: [None])
own and own mask  padding changes the logits: False  (masks seen: [(1, 1, 11, 11)])
own_flash         ValueError: Could not find the currently requested flash attention implementation at `own_flash`
SEEN

"""peft's LoRA on a transformers model with "flash_attention_2", with and without checkpointing."""

from __future__ import annotations

import pytest
import torch
import transformers_models as models
from helpers import compare, gradients
from peft import LoraConfig, get_peft_model
from transformers_models import DECODERS, FLASH, make_pair

from anyflash.integrations import transformers as integration

integration.enable(flash_attention_2=True)


def adapted():
    pair = []
    for model in make_pair(DECODERS["Llama"], FLASH):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj"])
        pair.append(get_peft_model(model, config))
        for name, parameter in pair[-1].named_parameters():
            if "lora_B" in name:  # zero at first
                torch.nn.init.normal_(parameter, std=0.1)
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


@pytest.mark.shows("found", "imported", "forward", "backward")
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_lora(use_reentrant):
    eager, ours = adapted()
    ids, mask = models.tokens(2, 12), models.padding((12, 7), 12, "right")
    labels = ids.masked_fill(mask == 0, -100)
    if use_reentrant is not None:
        ours.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        ours.enable_input_require_grads()
    losses = []
    for model in (ours, eager):
        model.train()
        out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        out.loss.backward()
        losses.append(out.loss)
    compare(*losses)
    compare(gradients(ours), gradients(eager))

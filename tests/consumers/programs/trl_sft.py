"""trl's SFTTrainer on a transformers model with "flash_attention_2": padding-free, checkpointed."""

from __future__ import annotations

import pytest
import torch
import transformers_models as models
from datasets import Dataset
from helpers import compare, gradients
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast
from transformers_models import DECODERS, FLASH, make_pair
from trl import SFTConfig, SFTTrainer
from trl.models import enable_selective_activation_checkpointing

from anyflash.integrations import transformers as integration

integration.enable(flash_attention_2=True)


def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(58))])}
    made = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def train(model, folder, **more):
    """Loss of every step of a tiny training."""
    rows = [{"input_ids": models.tokens(1, n)[0].tolist()} for n in (12, 5, 9, 7)]
    settings = SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, max_length=None, report_to=[], use_cpu=True, save_strategy="no",
        bf16=False, seed=0, disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    return torch.tensor([e["loss"] for e in trainer.state.log_history if "loss" in e])


@pytest.mark.shows("found", "imported", "forward", "backward")
@pytest.mark.parametrize("padding_free", [False, True])
def test_sft(padding_free, tmp_path):
    eager, ours = make_pair(DECODERS["Llama"], FLASH)
    more = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    found = train(ours, tmp_path / "ours", padding_free=padding_free, **more)
    wanted = train(eager, tmp_path / "eager", gradient_checkpointing=False)
    assert len(found) == 3
    compare(found, wanted, 1e-3)


def selective(model, ids):
    """How often attention's forward was computed in the backward of a selectively checkpointed
    model: by which operators, not under which names it was looked for."""
    enable_selective_activation_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss = model(ids, labels=ids, use_cache=False).loss
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    computes = "anyflash::_flash_attn_forward"
    return sum(event.count for event in profile.key_averages() if event.key == computes)


@pytest.mark.shows("backward")
def test_selective_checkpointing_is_right():
    eager, ours = make_pair(DECODERS["Llama"], FLASH)
    ids = models.tokens(2, 12)
    selective(ours, ids)
    eager(ids, labels=ids).loss.backward()
    compare(gradients(ours), gradients(eager))


@pytest.mark.shows("backward")
def test_selective_checkpointing_saves_attention():
    _, ours = make_pair(DECODERS["Llama"], FLASH)
    assert selective(ours, models.tokens(2, 12)) == 0

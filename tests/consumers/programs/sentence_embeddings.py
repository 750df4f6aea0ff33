"""sentence-transformers: it lays sentences end to end where the attention is a flash one."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, compare, compare_accelerated

from anyflash.integrations import transformers as integration

integration.enable(flash_attention_2=True)

import sentence_transformers  # noqa: E402
import transformers  # noqa: E402
from sentence_transformers.models import Pooling, Transformer  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "attention", "is", "all", "you", "need", "nothing"]
SENTENCES = ["attention is all you need", "nothing", "you need all attention is nothing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with random weights, and a tokenizer of a dozen words."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def model(folder, attention, dtype=torch.float32):
    settings = {"attn_implementation": attention, "dtype": dtype}
    transformer = Transformer(folder, model_kwargs=settings)
    return sentence_transformers.SentenceTransformer(
        modules=[transformer, Pooling(32)], device="cpu"
    )


@pytest.mark.shows("found", "imported")
def test_it_flattens(folder):
    """Only under a name with "flash" in it: the registered one pads."""
    assert model(folder, "flash_attention_2")[0]._is_flash_attention_requested()
    assert not model(folder, integration.NAME)[0]._is_flash_attention_requested()


@pytest.mark.shows("forward")
@pytest.mark.parametrize("attention", ["flash_attention_2", integration.NAME])
def test_encode(folder, attention):
    found, wanted = (model(folder, name).encode(SENTENCES) for name in (attention, "eager"))
    compare(torch.tensor(found), torch.tensor(wanted))


@pytest.mark.shows("forward")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encode_under_accelerate_sdpa(folder, dtype):
    """With PyTorch's attention, padded."""
    encoder = model(folder, "sdpa", dtype)
    compare_accelerated(lambda: encoder.encode(SENTENCES, convert_to_tensor=True).float(), dtype)

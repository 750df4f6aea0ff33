"""flash_attn.models.bert: what transformers' BERT computes, on padded and on packed sequences."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from flash_attn.models import bert

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
IDS = torch.randint(1, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
TYPES = (torch.arange(9) > 4).long().expand(3, 9)
NEXT = torch.tensor([0, 1, -1])
LABELS = torch.zeros(3, 9, dtype=torch.long)
LABELS[0, 0], LABELS[0, 4], LABELS[1, 2], LABELS[2, 6] = 7, 11, 13, 17


def _config(**attributes):
    return transformers.BertConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "eager",
            **attributes,
        }
    )


def _theirs(hidden_act: str = "gelu") -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(_config(hidden_act=hidden_act))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def _ours(hidden_act: str = "gelu", **options) -> bert.BertForPreTraining:
    config = _config(hidden_act=hidden_act, **options)
    model = bert.BertForPreTraining(config)
    model.load_state_dict(bert.remap_state_dict(_theirs(hidden_act).state_dict(), config))
    return model.eval()


def _expected_loss(logits, relationship):
    """The mean over the masked tokens (transformers' own also counts those that are not)."""
    masked = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), ignore_index=0)
    return masked + F.cross_entropy(relationship, NEXT, ignore_index=-1)


def _close(actual, expected):
    atol = 2e-4 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=atol)


OPTIONS = [
    {},
    {"use_flash_attn": True},
    {"fused_bias_fc": True},
    {"fused_dropout_add_ln": True},
    {"fused_mlp": True, "hidden_act": "gelu_new"},
    {"fused_mlp": True, "hidden_act": "gelu_new", "mlp_checkpoint_lvl": [0, 1, 2]},
    {"use_xentropy": True},
    {"pad_vocab_size_multiple": 8},
    {"dense_seq_output": True},
    {"dense_seq_output": True, "use_flash_attn": True},
    {"dense_seq_output": True, "last_layer_subset": True},
    {"dense_seq_output": True, "last_layer_subset": True, "use_flash_attn": True},
]


@pytest.mark.providers
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
def test_as_transformers(options):
    theirs = _theirs(options.get("hidden_act", "gelu"))
    ours = _ours(**options)
    inputs = {"input_ids": IDS, "attention_mask": MASK.long(), "token_type_ids": TYPES}
    output = ours(**inputs, labels=LABELS, next_sentence_label=NEXT)
    expected = theirs(**inputs)
    assert type(output).__name__ == "BertForPreTrainingOutput"
    logits = expected.prediction_logits
    if options.get("dense_seq_output"):
        _close(output.prediction_logits, logits[LABELS > 0])
    else:
        _close(output.prediction_logits[MASK][:, :VOCABULARY], logits[MASK])
    _close(output.seq_relationship_logits, expected.seq_relationship_logits)
    loss = _expected_loss(logits, expected.seq_relationship_logits)
    _close(output.loss, loss)
    (actual_grad,) = torch.autograd.grad(output.loss, ours.bert.embeddings.word_embeddings.weight)
    (expected_grad,) = torch.autograd.grad(loss, theirs.get_input_embeddings().weight)
    _close(actual_grad[:VOCABULARY], expected_grad)


def test_without_labels_all_tokens_come_back():
    model = _ours(dense_seq_output=True, last_layer_subset=True, use_flash_attn=True)
    output = model(IDS, attention_mask=MASK)
    assert output.loss is None and output.prediction_logits.shape == (3, 9, VOCABULARY)
    _close(output.prediction_logits[MASK], _ours()(IDS, attention_mask=MASK)[0][MASK])


@pytest.mark.providers
def test_packed_is_as_padded():
    """Every position of the padded path that holds a token; zeros in the others of the packed."""
    padded, packed = _ours().bert, _ours(use_flash_attn=True).bert
    expected = padded(IDS, attention_mask=MASK)
    output = packed(IDS, attention_mask=MASK)
    _close(output.last_hidden_state[MASK], expected.last_hidden_state[MASK])
    assert output.last_hidden_state[~MASK].abs().max() == 0
    _close(output.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("use_flash_attn", [False, True])
def test_a_subset_of_the_tokens(use_flash_attn):
    wanted = torch.zeros(3, 9, dtype=torch.bool)
    wanted[0, 3] = wanted[1, 0] = wanted[2, 8] = True  # the last one isn't there
    model = _ours(dense_seq_output=True, last_layer_subset=True, use_flash_attn=use_flash_attn).bert
    output = model(IDS, attention_mask=MASK.long(), masked_tokens_mask=wanted)
    whole = _ours().bert(IDS, attention_mask=MASK)
    _close(output.last_hidden_state, whole.last_hidden_state[wanted & MASK])
    _close(output.pooler_output, whole.pooler_output)
    output = model(IDS, masked_tokens_mask=wanted)
    whole = _ours().bert(IDS)
    _close(output.last_hidden_state, whole.last_hidden_state[wanted])


def test_rotary_positions():
    """Logits then depend on distances alone: with no table of positions, shifting changes none."""
    config = _config(position_embedding_type="rotary", rotary_emb_dim=8)
    model = bert.BertModel(config, add_pooling_layer=False).eval()
    assert model.encoder.layers[0].mixer.rotary_emb_dim == 8
    torch.nn.init.zeros_(model.embeddings.position_embeddings.weight)
    padding = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 9, dtype=torch.bool)], 1)
    output = model(IDS)
    assert output.pooler_output is None
    shifted = model(torch.cat([padding, IDS], dim=1), attention_mask=mask)
    _close(shifted.last_hidden_state[:, 4:], output.last_hidden_state)
    order = model(IDS.flip(1)).last_hidden_state.flip(1)
    assert (order - output.last_hidden_state).abs().max() > 1e-4


def test_initialisation():
    torch.manual_seed(0)
    model = bert.BertForPreTraining(_config(hidden_size=128, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "norm" in name or "_ln" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std().item() / 0.05 - 1) < 0.15, name
    words = model.bert.embeddings.word_embeddings
    assert words.weight[words.padding_idx].abs().max() == 0
    assert model.cls.predictions.decoder.weight is words.weight


def test_loaded_from_a_folder(tmp_path):
    theirs = _theirs()
    theirs.save_pretrained(tmp_path)
    model = bert.BertForPreTraining.from_pretrained(str(tmp_path), _config()).eval()
    output = model(IDS, attention_mask=MASK)
    _close(output.prediction_logits[MASK], theirs(IDS, attention_mask=MASK)[0][MASK])


def test_refused_configurations():
    for changes, words in (
        ({"hidden_act": "relu"}, "hidden_act: expected one of gelu, .* got 'relu'"),
        ({"fused_mlp": True}, "hidden_act with fused_mlp: expected one of .* got 'gelu'"),
        ({"last_layer_subset": True}, "dense_seq_output: expected True with last_layer_subset"),
    ):
        with pytest.raises(ValueError, match=words):
            bert.BertForPreTraining(_config(**changes))
    with pytest.raises(ValueError, match="layer_idx: expected a number for a mlp_checkpoint_lvl"):
        bert.create_mlp_cls(
            _config(fused_mlp=True, hidden_act="gelu_new", mlp_checkpoint_lvl=[0, 1, 2])
        )


def test_without_transformers():
    """Any object is a configuration, and the outputs have the same names."""
    program = textwrap.dedent(
        """
        import sys
        sys.modules["transformers"] = None
        from types import SimpleNamespace
        import torch
        from flash_attn.models.bert import BertForPreTraining
        config = SimpleNamespace(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
            vocab_size=61, max_position_embeddings=16, type_vocab_size=2, pad_token_id=0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, hidden_act="gelu",
            layer_norm_eps=1e-12, initializer_range=0.02,
        )
        output = BertForPreTraining(config)(torch.ones(2, 5, dtype=torch.long))
        assert output.loss is None and output.prediction_logits.shape == (2, 5, 61)
        assert output.seq_relationship_logits.shape == (2, 2)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

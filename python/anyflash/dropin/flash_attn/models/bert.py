"""BERT for pre-training.

A configuration is any object with the attributes of transformers' BertConfig. Attributes beyond
those, all optional, choose the variants:

    pad_vocab_size_multiple, orig_vocab_size, position_embedding_type ("rotary"), rotary_emb_dim,
    rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved,
    dense_seq_output (the heads see the masked tokens only),
    last_layer_subset (the last layer too),
    use_flash_attn, fused_bias_fc, fused_mlp, mlp_checkpoint_lvl (a number, or one per layer),
    fused_dropout_add_ln, use_xentropy.
"""

# ruff: noqa: F401  (clients import the names of the layers from here)
from __future__ import annotations

import logging
from collections import namedtuple
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from einops import rearrange
from torch import Tensor

from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    pad_input,
    unpad_input,
)
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models import _remap
from flash_attn.models._bert_checkpoints import inv_remap_state_dict, remap_state_dict
from flash_attn.models._bert_layers import (
    BertEncoder,
    _init_weights,
    approximate,
    create_block,
    create_mixer_cls,
    create_mlp_cls,
)
from flash_attn.modules.block import Block
from flash_attn.modules.embedding import BertEmbeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, Mlp
from flash_attn.ops.fused_dense import FusedDense
from flash_attn.ops.triton.layer_norm import layer_norm_fn
from flash_attn.utils.pretrained import state_dict_from_pretrained

logger = logging.getLogger(__name__)


def _output_class(module: str, name: str, fields: str) -> type:
    """transformers' class of outputs, or without transformers a tuple with the same names."""
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except ImportError:
        return namedtuple(name, fields, defaults=[None] * len(fields.split()))


def _linear_cls(config: Any) -> type[nn.Linear]:
    return FusedDense if getattr(config, "fused_bias_fc", False) else nn.Linear


def _norm(x: Tensor, norm: nn.LayerNorm, fused: bool) -> Tensor:
    return layer_norm_fn(x, norm.weight, norm.bias, eps=norm.eps) if fused else norm(x)


class BertPooler(nn.Module):
    """tanh of a linear layer, on the first token of each sequence."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = _linear_cls(config)(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor, pool: bool = True) -> Tensor:
        """(batch, seqlen, hidden_size), or the (batch, hidden_size) first tokens if not pool."""
        return self.activation(self.dense(hidden_states[:, 0] if pool else hidden_states))


class BertPredictionHeadTransform(nn.Module):
    """Linear, GELU, LayerNorm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        self.dense = _linear_cls(config)(config.hidden_size, config.hidden_size)
        self.transform_act_fn = nn.GELU(approximate=approximate(config))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.transform_act_fn(self.dense(hidden_states))
        return _norm(hidden_states, self.layer_norm, self.fused_dropout_add_ln)


class BertLMPredictionHead(nn.Module):
    """(..., hidden_size) to logits (..., vocabulary)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = _linear_cls(config)(config.hidden_size, config.vocab_size, bias=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))


class BertPreTrainingHeads(nn.Module):
    """The heads of masked language modelling and of next sentence prediction."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, sequence_output: Tensor, pooled_output: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictions(sequence_output), self.seq_relationship(pooled_output)


class BertPreTrainedModel(nn.Module):
    """A model that keeps its configuration and loads transformers' checkpoints."""

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls, model_name: str, config: Any, *inputs: Any, **kwargs: Any
    ) -> BertPreTrainedModel:
        """A model with the weights of a BertForPreTraining of transformers.

        Args:
            model_name: see state_dict_from_pretrained.
            config: of the model to make.
        """
        model = cls(config, *inputs, **kwargs)
        state_dict = remap_state_dict(state_dict_from_pretrained(model_name), config)
        logger.info(model.load_state_dict(state_dict, strict=False))
        return model


class BertModel(BertPreTrainedModel):
    """Embeddings, encoder and pooler.

    It rounds config.vocab_size up to config.pad_vocab_size_multiple, as upstream's does.
    """

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.pad_vocab_size_multiple = getattr(config, "pad_vocab_size_multiple", 1)
        config.vocab_size = _remap.padded_vocab_size(config)
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        self.embeddings = BertEmbeddings(
            config.hidden_size,
            config.vocab_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
        )
        self.emb_drop = nn.Dropout(config.hidden_dropout_prob)
        self.emb_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))
        self._output_class = _output_class(
            "transformers.modeling_outputs",
            "BaseModelOutputWithPoolingAndCrossAttentions",
            "last_hidden_state pooler_output",
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_tokens_mask: Tensor | None = None,
    ) -> Any:
        """last_hidden_state (batch, seqlen, hidden_size) and pooler_output (batch, hidden_size).

        Args:
            input_ids, position_ids, token_type_ids: (batch, seqlen).
            attention_mask: (batch, seqlen), False or 0 where there is no token.
            masked_tokens_mask: bool (batch, seqlen), the only tokens that last_hidden_state is
                wanted of; it is (tokens, hidden_size) then.
        """
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
        hidden_states = self.embeddings(
            input_ids, position_ids=position_ids, token_type_ids=token_type_ids
        )
        hidden_states = self.emb_drop(_norm(hidden_states, self.emb_ln, self.fused_dropout_add_ln))
        if masked_tokens_mask is None:
            sequence_output = self.encoder(hidden_states, key_padding_mask=attention_mask)
            pooled = None if self.pooler is None else self.pooler(sequence_output)
        else:
            first = torch.zeros_like(masked_tokens_mask)
            first[:, 0] = True  # the pooler's
            subset = masked_tokens_mask | first
            if attention_mask is not None:
                subset = subset & attention_mask
            output = self.encoder(
                hidden_states, key_padding_mask=attention_mask, subset_mask=subset
            )
            sequence_output = output[masked_tokens_mask[subset]]
            pooled = None if self.pooler is None else self.pooler(output[first[subset]], pool=False)
        return self._output_class(last_hidden_state=sequence_output, pooler_output=pooled)


class BertForPreTraining(BertPreTrainedModel):
    """BertModel and the heads of pre-training."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dense_seq_output = getattr(config, "dense_seq_output", False)
        self.last_layer_subset = getattr(config, "last_layer_subset", False)
        if self.last_layer_subset and not self.dense_seq_output:
            raise ValueError("dense_seq_output: expected True with last_layer_subset, got False")
        fused_loss = getattr(config, "use_xentropy", False)
        loss_cls = (
            partial(CrossEntropyLoss, inplace_backward=True) if fused_loss else nn.CrossEntropyLoss
        )
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.mlm_loss = loss_cls(ignore_index=0)
        self.nsp_loss = loss_cls(ignore_index=-1)
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))
        self.tie_weights()
        self._output_class = _output_class(
            "transformers.models.bert.modeling_bert",
            "BertForPreTrainingOutput",
            "loss prediction_logits seq_relationship_logits",
        )

    def tie_weights(self) -> None:
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> Any:
        """loss (None unless both labels are given), prediction_logits, seq_relationship_logits.

        Args:
            labels: (batch, seqlen), the tokens that were masked, 0 elsewhere. With
                config.dense_seq_output, prediction_logits are (masked tokens, vocabulary).
            next_sentence_label: (batch,), -1 for no label.
        """
        masked = labels > 0 if self.dense_seq_output and labels is not None else None
        outputs = self.bert(
            input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
            masked_tokens_mask=masked if self.last_layer_subset else None,
        )
        sequence_output = outputs.last_hidden_state
        if masked is not None and labels is not None:
            masked_idx = masked.flatten().nonzero().flatten()
            labels = labels.flatten()[masked_idx]
            if not self.last_layer_subset:
                sequence_output = index_first_axis(sequence_output.flatten(0, 1), masked_idx)
        prediction, relationship = self.cls(sequence_output, outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = self.mlm_loss(rearrange(prediction, "... v -> (...) v"), labels.flatten())
            next_sentence_loss = self.nsp_loss(relationship, next_sentence_label.flatten())
            loss = loss.float() + next_sentence_loss.float()
        return self._output_class(
            loss=loss, prediction_logits=prediction, seq_relationship_logits=relationship
        )

"""flash_attn.models: the decoders compute what transformers' models of the same weights do."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from flash_attn.models import baichuan, bigcode, btlm, falcon, gpt, gpt_neox, gptj, llama, opt
from flash_attn.utils.generation import InferenceParams

transformers = pytest.importorskip("transformers")

VOCABULARY, LAYERS = 61, 3
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _family(name, module, model=None, **attributes):
    """transformers' configuration and model, our conversion of its configuration and weights."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **attributes})
    kind = module.__name__.rsplit(".", 1)[1]
    convert = getattr(module, f"{kind}_config_to_gpt2_config", lambda config: config)
    remap = getattr(module, f"remap_state_dict_hf_{kind}", gpt.remap_state_dict_hf_gpt2)
    return config, getattr(transformers, model or f"{name}ForCausalLM"), convert, remap


FAMILIES = {
    "gpt2": lambda: _family("GPT2", gpt, model="GPT2LMHeadModel"),
    "gpt2 by layer": lambda: _family(
        "GPT2", gpt, model="GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True
    ),
    "llama": lambda: _family("Llama", llama, intermediate_size=128, rope_theta=1000.0),
    "llama gqa": lambda: _family(
        "Llama", llama, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "llama biases": lambda: _family(
        "Llama", llama, intermediate_size=128, attention_bias=True, mlp_bias=True
    ),
    "gpt_neox": lambda: _family("GPTNeoX", gpt_neox, intermediate_size=64),
    "gpt_neox serial": lambda: _family(
        "GPTNeoX", gpt_neox, intermediate_size=64, use_parallel_residual=False
    ),
    "gptj": lambda: _family("GPTJ", gptj, rotary_dim=4),
    "opt": lambda: _family("OPT", opt, ffn_dim=64),
    "opt-350m": lambda: _family(
        "OPT", opt, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "falcon-7b": lambda: _family("Falcon", falcon),
    "falcon-7b biases": lambda: _family("Falcon", falcon, bias=True),
    "falcon-40b": lambda: _family("Falcon", falcon, new_decoder_architecture=True, num_kv_heads=2),
    "falcon2": lambda: _family(
        "Falcon",
        falcon,
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
        ffn_hidden_size=96,
    ),
    "falcon serial": lambda: _family(
        "Falcon", falcon, multi_query=False, parallel_attn=False, bias=True
    ),
    "bigcode": lambda: _family("GPTBigCode", bigcode),
}


def _ids(batch: int = 2, seqlen: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, seqlen), generator=generator)


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every part of the model matters, biases and norms included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def _pair(family: str, **options):
    """A model of transformers, and ours with its weights and these options."""
    config, theirs_cls, convert, remap = FAMILIES[family]()
    config._attn_implementation = "eager"
    theirs = _randomised(theirs_cls(config))
    ours_config = convert(config)
    for name, value in options.items():
        setattr(ours_config, name, value)
    ours = gpt.GPTLMHeadModel(ours_config)
    ours.load_state_dict(remap(theirs.state_dict(), ours_config))
    return theirs, ours.eval()


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    atol = 2e-4 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    theirs, ours = _pair(family)
    with torch.no_grad():
        output = ours(_ids())
        assert output._fields == ("logits",) and type(output).__name__ == "CausalLMOutput"
        _close(output.logits, theirs(_ids()).logits)


@pytest.mark.providers
@pytest.mark.parametrize(
    "options",
    [
        {"use_flash_attn": True},
        {"fused_bias_fc": True},
        {"fused_mlp": True},
        {"fused_mlp": True, "mlp_checkpoint_lvl": [0, 1, 2]},
        {"fused_dropout_add_ln": True},
        {"residual_in_fp32": True},
        {"fused_dropout_add_ln": True, "residual_in_fp32": True, "use_flash_attn": True},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("family", ["gpt2", "llama gqa", "gptj", "falcon-40b"])
def test_options(family, options):
    if "fused_mlp" in options and family in ("llama gqa", "falcon-40b"):
        with pytest.raises(ValueError, match="activation_function with fused_mlp: expected one of"):
            _pair(family, **options)
        return
    if options.get("residual_in_fp32") and family == "opt-350m":
        return
    theirs, ours = _pair(family, **options)
    ids = _ids()
    loss, expected = (
        F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for model in (ours, theirs)
    )
    _close(loss, expected)
    embeddings = (
        ours.transformer.embeddings.word_embeddings.weight,
        theirs.get_input_embeddings().weight,
    )
    ours_grad, theirs_grad = (
        torch.autograd.grad(value, weight)[0] for value, weight in zip((loss, expected), embeddings)
    )
    _close(ours_grad, theirs_grad)


def test_half_precision_with_a_float_residual():
    theirs, ours = _pair("llama gqa", residual_in_fp32=True)
    ours = ours.bfloat16()
    with torch.no_grad():
        logits = ours(_ids()).logits
        assert logits.dtype == torch.bfloat16
        expected = theirs(_ids()).logits
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("multiple", [8])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_padded_vocabulary(family, multiple):
    theirs, ours = _pair(family, pad_vocab_size_multiple=multiple)
    with torch.no_grad():
        logits = ours(_ids()).logits
        assert logits.shape[-1] == 64
        _close(logits[..., :VOCABULARY], theirs(_ids()).logits)


def test_last_tokens():
    _, ours = _pair("gpt2")
    with torch.no_grad():
        whole = ours(_ids()).logits
        _close(ours(_ids(), num_last_tokens=3).logits, whole[:, -3:])
        positions = torch.arange(11).expand(2, 11)
        _close(ours(_ids(), position_ids=positions).logits, whole)
    with pytest.raises(ValueError, match=r"input_ids: expected \(batch, seqlen\), got \(11,\)"):
        ours(_ids()[0])


@pytest.mark.providers
@pytest.mark.parametrize("use_flash_attn", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama gqa", "gpt_neox", "opt-350m", "falcon-7b"])
def test_generation_with_and_without_a_cache(family, use_flash_attn):
    theirs, ours = _pair(family, use_flash_attn=use_flash_attn)
    ids = _ids(seqlen=5)
    with torch.no_grad():
        generated = ours.generate(ids, max_length=12)
        steps = ids
        while steps.shape[1] < 12:
            following = theirs(steps).logits[:, -1].argmax(-1, keepdim=True)
            steps = torch.cat([steps, following], dim=1)
        assert torch.equal(generated, steps)


@pytest.mark.parametrize("use_flash_attn", [False, True])
def test_step_by_step_logits(use_flash_attn):
    _, ours = _pair("llama gqa", use_flash_attn=use_flash_attn)
    ids = _ids(seqlen=9)
    caches = ours.allocate_inference_cache(2, 12, dtype=torch.float32)
    assert list(caches) == [0, 1, 2] and caches[0].shape == (2, 12, 2, 2, 8)
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    params.key_value_memory_dict = caches
    with torch.no_grad():
        whole = ours(ids).logits
        first = ours(ids[:, :6], inference_params=params).logits
        _close(first, whole[:, :6])
        for position in range(6, 9):
            params.seqlen_offset = position
            positions = torch.full((2, 1), position)
            token = ids[:, position : position + 1]
            step = ours(token, position_ids=positions, inference_params=params).logits
            _close(step[:, 0], whole[:, position])


def _namespace(**attributes) -> SimpleNamespace:
    """A configuration without transformers."""
    defaults = {
        **SIZES,
        "n_inner": 64,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
    }
    return SimpleNamespace(**{**defaults, **attributes})


def test_initialisation():
    config = _namespace(hidden_size=256, n_inner=512, mup_width_scale=0.25, lm_head_bias=True)
    torch.manual_seed(0)
    model = gpt.GPTLMHeadModel(config)
    torch.manual_seed(0)
    again = gpt.GPTLMHeadModel(config)
    for (name, parameter), other in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(parameter, other), name
        std = 0.02 * (1.0 if "embeddings" in name or "lm_head" in name else math.sqrt(0.25))
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "norm" in name or "ln_f" in name:
            assert (parameter == 1).all(), name
        else:
            if "out_proj" in name or "fc2" in name:
                std /= math.sqrt(2 * LAYERS)
            assert abs(parameter.std().item() / std - 1) < 0.1, name
            if "embeddings" not in name:
                assert parameter._optim == {"lr_multiplier": 0.25}, name
    assert model.lm_head.weight is model.transformer.embeddings.word_embeddings.weight


def test_dropout_is_where_the_configuration_says():
    config = _namespace(embd_pdrop=0.1, resid_pdrop=0.2, attn_pdrop=0.3)
    model = gpt.GPTModel(config)
    assert [layer.dropout1.p for layer in model.layers] == [0.1, 0.2, 0.2]
    assert [layer.dropout2.p for layer in model.layers] == [0.2] * 3
    assert model.drop_f.p == 0.2 and [layer.layer_idx for layer in model.layers] == [0, 1, 2]


def test_rotary_tables_are_shared():
    model = gpt.GPTModel(_namespace(rotary_emb_fraction=0.5, max_position_embeddings=0))
    tables = {id(layer.mixer.rotary_emb) for layer in model.layers}
    assert len(tables) == 1 and model.layers[0].mixer.rotary_emb_dim == 4


def test_checkpoints_of_before_the_norms_moved():
    model = _randomised(gpt.GPTLMHeadModel(_namespace()))
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = dict(state_dict)
    # Then the first norm came before the layers, each of which ended with the norm of the next.
    order = ["ln_0", *(f"layers.{i}.norm{j}" for i in range(LAYERS) for j in (1, 2))]
    now = [*order[1:], "ln_f"]
    for before, after in zip(order, now):
        for kind in ("weight", "bias"):
            old[f"transformer.{before}.{kind}"] = state_dict[f"transformer.{after}.{kind}"]
    for kind in ("weight", "bias"):
        del old[f"transformer.ln_f.{kind}"]
    given = dict(old)
    loaded = gpt.GPTLMHeadModel(_namespace())
    loaded.load_state_dict(old)
    assert old.keys() == given.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state_dict[name]), name


def test_muP_and_a_normalised_head():
    """The multipliers, from the formulas."""
    plain = _randomised(gpt.GPTLMHeadModel(_namespace(tie_word_embeddings=False)))
    config = _namespace(
        tie_word_embeddings=False,
        norm_head=True,
        mup_width_scale=0.5,
        mup_output_multiplier=3.0,
        mup_embeddings_multiplier=2.0,
        mup_scale_qk_dot_by_d=True,
        mup_attn_multiplier=math.sqrt(8),
    )
    scaled = gpt.GPTLMHeadModel(config).eval()
    state_dict = copy.deepcopy(plain.state_dict())
    scaled.load_state_dict(state_dict)
    assert scaled.transformer.layers[0].mixer.inner_attn.softmax_scale == pytest.approx(8**-0.5)
    for name in ("word", "position"):
        plain.transformer.embeddings.get_submodule(f"{name}_embeddings").weight.data.mul_(2.0)
    with torch.no_grad():
        hidden = plain.transformer(_ids())
        head = F.normalize(plain.lm_head.weight, dim=1)
        _close(scaled(_ids()).logits, 1.5 * hidden @ head.T)


def test_baichuan():
    """Llama with one weight for queries, keys and values."""
    config, model_cls, _, _ = FAMILIES["llama"]()
    config._attn_implementation, config.rope_parameters["rope_theta"] = "eager", 10000.0
    theirs = _randomised(model_cls(config))
    state_dict = theirs.state_dict()
    for i in range(LAYERS):
        prefix = f"model.layers.{i}.self_attn"
        parts = [state_dict.pop(f"{prefix}.{x}_proj.weight") for x in "qkv"]
        state_dict[f"{prefix}.W_pack.weight"] = torch.cat(parts)
    ours_config = baichuan.baichuan_config_to_gpt2_config(config)
    ours = gpt.GPTLMHeadModel(ours_config).eval()
    ours.load_state_dict(baichuan.remap_state_dict_hf_baichuan(state_dict, ours_config))
    with torch.no_grad():
        _close(ours(_ids()).logits, theirs(_ids()).logits)


BTLM = SimpleNamespace(
    **SIZES,
    position_embedding_type="alibi",
    n_positions=16,
    n_inner=48,
    activation_function="swiglu",
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    layer_norm_epsilon=1e-5,
    initializer_range=0.02,
    mup_width_scale=0.5,
    mup_embeddings_scale=3.0,
    mup_output_alpha=2.0,
    mup_scale_qk_dot_by_d=True,
)


def _btlm_state_dict() -> dict[str, torch.Tensor]:
    shapes = {"transformer.wte.weight": (VOCABULARY, 32), "transformer.relative_pe.slopes": (4, 1)}
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attn.c_attn", 32, 96),
            ("attn.c_proj", 32, 32),
            ("mlp.c_fc", 32, 48),
            ("mlp.c_fc2", 32, 48),
            ("mlp.c_proj", 48, 32),
        ):
            shapes[f"transformer.h.{i}.{name}.weight"] = (rows, columns)
            shapes[f"transformer.h.{i}.{name}.bias"] = (columns,)
        for name in ("ln_1", "ln_2"):
            shapes[f"transformer.h.{i}.{name}.weight"] = (32,)
            shapes[f"transformer.h.{i}.{name}.bias"] = (32,)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (32,)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.4 * torch.randn(*s, generator=generator) for name, s in shapes.items()}


def _btlm_logits(state_dict: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """BTLM (Dey et al. 2023): muP, ALiBi, SwiGLU, in float64."""
    w = {name.replace("transformer.", ""): t.double() for name, t in state_dict.items()}

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    seqlen = ids.shape[1]
    distance = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
    slopes = 2.0 ** -torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float64)
    bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf)
    x = w["wte.weight"][ids] * 3.0
    for i in range(LAYERS):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
        attention = (q @ k.transpose(-1, -2) / 8 + bias).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        h = norm(x, f"h.{i}.ln_2")
        gated = linear(h, f"h.{i}.mlp.c_fc") * F.silu(linear(h, f"h.{i}.mlp.c_fc2"))
        x = x + linear(gated, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T * (2.0 * 0.5)


def test_btlm():
    config = btlm.btlm_config_to_gpt2_config(BTLM)
    ours = gpt.GPTLMHeadModel(config).eval()
    state_dict = _btlm_state_dict()
    ours.load_state_dict(btlm.remap_state_dict_hf_btlm(state_dict, config))
    with torch.no_grad():
        _close(ours(_ids()).logits.double(), _btlm_logits(state_dict, _ids()))


def test_loaded_by_name(tmp_path, monkeypatch):
    theirs, _ = _pair("llama gqa")
    (tmp_path / "meta-llama").mkdir()
    monkeypatch.chdir(tmp_path)
    theirs.save_pretrained("meta-llama/Llama-tiny")
    config = llama.llama_config_to_gpt2_config(theirs.config)
    ours = gpt.GPTLMHeadModel.from_pretrained("meta-llama/Llama-tiny", config).eval()
    with torch.no_grad():
        _close(ours(_ids()).logits, theirs(_ids()).logits)
    half = gpt.GPTLMHeadModel.from_pretrained("meta-llama/Llama-tiny", config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with pytest.raises(NotImplementedError, match="Model mistral not supported: expected a name"):
        gpt.GPTLMHeadModel.from_pretrained("mistral", config)


def test_refused_configurations():
    for changes, words in (
        ({"activation_function": "mish"}, "activation_function: expected one of gelu, .*'mish'"),
        ({"fused_mlp": True, "activation_function": "gelu"}, "with fused_mlp: .* got 'gelu'"),
        ({"fused_dense_sqrelu_dense": True}, "expected one of sqrelu, got 'gelu_new'"),
        ({"parallel_block": True, "prenorm": False}, "prenorm: expected True with parallel_block"),
    ):
        with pytest.raises(ValueError, match=words):
            gpt.GPTLMHeadModel(_namespace(**changes))
    with pytest.raises(ValueError, match="layer_idx: expected a number for a mlp_checkpoint_lvl"):
        gpt.create_mlp_cls(_namespace(fused_mlp=True, mlp_checkpoint_lvl=[0, 1]))
    with pytest.raises(ValueError, match="layer_idx: expected a number for scale_attn_by_inver"):
        gpt.create_mixer_cls(_namespace(scale_attn_by_inverse_layer_idx=True))

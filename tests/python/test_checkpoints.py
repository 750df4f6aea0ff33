"""Checkpoints: state dicts and configurations of flash_attn.models, files of utils.pretrained."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from flash_attn.models import (
    _remap,
    baichuan,
    bert,
    bigcode,
    btlm,
    falcon,
    gpt,
    gpt_neox,
    llama,
    opt,
)
from flash_attn.utils.pretrained import state_dict_from_pretrained
from hypothesis import assume, given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")


def config_of(**changes) -> SimpleNamespace:
    """No class of transformers: any object with the attributes does."""
    defaults = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "n_inner": 60,
        "vocab_size": 60,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
    }
    return SimpleNamespace(**{**defaults, **changes})


def numbered(*shape: int) -> torch.Tensor:
    """No two rows and no two columns alike."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def gpt_state_dict(config) -> dict[str, torch.Tensor]:
    hidden, inner = config.hidden_size, config.n_inner
    heads_kv = getattr(config, "n_head_kv", None) or config.num_attention_heads
    head_dim = hidden // config.num_attention_heads
    qkv = hidden + 2 * heads_kv * head_dim
    fc1 = 2 * inner if config.activation_function in ("swiglu", "geglu", "glu") else inner
    layer = {
        "norm1.weight": (hidden,),
        "mixer.Wqkv.weight": (qkv, hidden),
        "mixer.Wqkv.bias": (qkv,),
        "mixer.out_proj.weight": (hidden, hidden),
        "mixer.out_proj.bias": (hidden,),
        "norm2.weight": (hidden,),
        "mlp.fc1.weight": (fc1, hidden),
        "mlp.fc1.bias": (fc1,),
        "mlp.fc2.weight": (hidden, inner),
        "mlp.fc2.bias": (hidden,),
    }
    shapes = {
        "transformer.embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "transformer.embeddings.position_embeddings.weight": (10, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
        "lm_head.bias": (config.vocab_size,),
    }
    for i in range(config.num_hidden_layers):
        shapes.update({f"transformer.layers.{i}.{name}": shape for name, shape in layer.items()})
    return {name: numbered(*shape) for name, shape in shapes.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([(4, None), (4, 2), (6, 3), (8, 1), (3, 3), (12, 4)]),
    st.sampled_from(["gelu_new", "swiglu"]),
)
def test_shards_round_trip(world_size, heads, activation):
    """World sizes that don't divide the heads included."""
    n_head, n_head_kv = heads
    assume(world_size <= (n_head_kv or n_head))
    config = config_of(num_attention_heads=n_head, n_head_kv=n_head_kv)
    config.activation_function = activation
    whole = gpt_state_dict(config)
    shards = [
        gpt.shard_state_dict_tp(dict(whole), config, world_size, rank) for rank in range(world_size)
    ]
    assert_same(gpt.combine_state_dicts_tp(shards, config), whole)
    for name in ("mixer.Wqkv.weight", "mlp.fc1.weight", "mlp.fc1.bias"):
        parts = [shard[f"transformer.layers.1.{name}"] for shard in shards]
        assert sum(map(len, parts)) == len(whole[f"transformer.layers.1.{name}"])


def test_what_a_rank_gets():
    """Five heads on two ranks: three and two, of queries, keys and values each."""
    config = config_of(hidden_size=20, num_attention_heads=5, activation_function="swiglu")
    second = gpt.shard_state_dict_tp(gpt_state_dict(config), config, 2, 1)
    qkv = second["transformer.layers.0.mixer.Wqkv.bias"]
    assert qkv.tolist() == [*range(12, 20), *range(32, 40), *range(52, 60)]
    assert second["transformer.layers.0.mixer.out_proj.weight"][0].tolist() == [*range(12, 20)]
    assert second["transformer.layers.0.mlp.fc1.bias"].tolist() == [*range(30, 60), *range(90, 120)]
    assert second["transformer.layers.0.mlp.fc2.weight"][0].tolist() == [*range(30, 60)]
    assert second["lm_head.bias"].tolist() == [*range(30, 60)]
    positions = second["transformer.embeddings.position_embeddings.weight"]
    assert positions[0].tolist() == [*range(10, 20)]
    grouped = config_of(hidden_size=24, num_attention_heads=6, n_head_kv=3)
    first = gpt.shard_state_dict_tp(gpt_state_dict(grouped), grouped, 2, 0)
    qkv = first["transformer.layers.0.mixer.Wqkv.bias"]  # heads of four: 4 + 2 + 2 of them
    assert qkv.tolist() == [*range(16), *range(24, 32), *range(36, 44)]
    for gone in ("mixer.out_proj.bias", "mlp.fc2.bias"):
        assert f"transformer.layers.0.{gone}" not in second
    assert second["transformer.ln_f.weight"].tolist() == [*range(20)]


def test_shards_of_meta_have_their_words_along_the_hidden_size():
    config = config_of()
    whole = gpt_state_dict(config)
    shards = [gpt.shard_state_dict_tp(dict(whole), config, 2, rank) for rank in range(2)]
    name = "transformer.embeddings.word_embeddings.weight"
    for shard, half in zip(shards, whole[name].chunk(2, dim=1)):
        shard[name] = half
    assert_same(gpt.combine_state_dicts_tp(shards, config), whole)


def test_refused_shards():
    config = config_of()
    for changes, words in (
        ({"vocab_size": 61}, "padded vocabulary: expected a multiple of world_size 2, got 61"),
        ({"hidden_size": 27, "num_attention_heads": 3}, "hidden_size: .* got 27"),
        ({"n_inner": 61}, "n_inner: .* got 61"),
        ({"n_head_kv": 1}, "key heads: expected one or more per rank of world_size 2, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            gpt.shard_state_dict_tp({}, config_of(**changes), 2, 0)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank: expected one of 0 .. 1, got {rank}"):
            gpt.shard_state_dict_tp({}, config, 2, rank)
    with pytest.raises(ValueError, match="state_dicts: expected one per rank, got none"):
        gpt.combine_state_dicts_tp([], config)


def random_state_dict(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def llama_pair(**changes):
    hf = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        **changes,
    )
    return llama.llama_config_to_gpt2_config(hf), transformers.LlamaForCausalLM(hf)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("biases", [False, True])
def test_llama_there_and_back(multiple, tied, biases):
    config, model = llama_pair(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
    config.pad_vocab_size_multiple = multiple
    theirs = random_state_dict(model)
    before = dict(theirs)
    ours = llama.remap_state_dict_hf_llama(theirs, config)
    assert_same(theirs, before)
    assert ours["lm_head.weight"].shape[0] == 61 + -61 % multiple
    assert ours["lm_head.weight"][61:].abs().sum() == 0
    back = llama.inv_remap_state_dict_hf_llama(ours, config)
    assert_same(back, theirs)


def test_llama_of_meta_and_of_transformers_agree():
    config, model = llama_pair()
    theirs = random_state_dict(model)

    def neighbours(weight):  # Meta rotates (0, 1), (2, 3), ...; transformers (0, d/2), ...
        return weight.view(-1, 2, 4, 32).transpose(1, 2).reshape(weight.shape)

    meta = {
        "tok_embeddings.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "output.weight": theirs["lm_head.weight"],
        "rope.freqs": torch.ones(4),
    }
    for i in range(2):
        hf, ours = f"model.layers.{i}", f"layers.{i}"
        for new, old in (("wq", "q_proj"), ("wk", "k_proj")):
            meta[f"{ours}.attention.{new}.weight"] = neighbours(
                theirs[f"{hf}.self_attn.{old}.weight"]
            )
        for new, old in (
            ("attention.wv", "self_attn.v_proj"),
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
            ("feed_forward.w3", "mlp.up_proj"),
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            meta[f"{ours}.{new}.weight"] = theirs[f"{hf}.{old}.weight"]
    assert_same(
        llama.remap_state_dict_meta_llama(meta, config),
        llama.remap_state_dict_hf_llama(theirs, config),
    )


def test_llama_checkpoints_of_meta(tmp_path):
    folder = tmp_path / "7B"
    folder.mkdir()
    params = {"dim": 96, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-5, "multiple_of": 32}
    (folder / "params.json").write_text(json.dumps(params))
    config = llama.config_from_checkpoint(tmp_path, "7B")
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (96, 256, 32000)
    assert config.num_key_value_heads == 4 and config.rms_norm_eps == 1e-5
    params.update(ffn_dim_multiplier=1.3, n_kv_heads=2, rope_theta=1e6)
    (folder / "params.json").write_text(json.dumps(params))
    config = llama.config_from_checkpoint(tmp_path, "7B", checkpoint_format="meta")
    assert (config.intermediate_size, config.num_key_value_heads) == (352, 2)
    assert llama.llama_config_to_gpt2_config(config).rotary_emb_base == 1e6
    for number in (1, 0):
        torch.save({"rank": torch.tensor(number)}, folder / f"consolidated.{number:02}.pth")
    shards = llama.state_dicts_from_checkpoint(tmp_path, "7B")
    assert [shard["rank"].item() for shard in shards] == [0, 1]


def test_llama_configuration_of_transformers(tmp_path):
    transformers.LlamaConfig(hidden_size=96, rope_theta=5e5).save_pretrained(tmp_path / "x-hf")
    config = llama.config_from_checkpoint(tmp_path, "x", checkpoint_format="hf")
    assert config.hidden_size == 96
    assert llama.llama_config_to_gpt2_config(config).rotary_emb_base == 5e5


@pytest.mark.parametrize("multiple", [1, 8])
def test_bigcode_there_and_back(multiple):
    # More features than words: the rows of the vocabulary are what is cut, not the columns.
    hf = transformers.GPTBigCodeConfig(n_embd=64, n_head=4, n_layer=2, vocab_size=29)
    theirs = random_state_dict(transformers.GPTBigCodeForCausalLM(hf))
    config = bigcode.bigcode_config_to_gpt2_config(hf)
    config.pad_vocab_size_multiple = multiple
    ours = bigcode.remap_state_dict_hf_bigcode(theirs, config)
    assert ours["transformer.layers.1.mixer.Wqkv.weight"].shape == (192, 64)
    assert_same(bigcode.inv_remap_state_dict_hf_bigcode(ours, config), theirs)
    config.multi_query = False
    with pytest.raises(ValueError, match="config.multi_query: expected True, got False"):
        bigcode.remap_state_dict_hf_bigcode(theirs, config)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("last_layer_subset", [False, True])
def test_bert_there_and_back(multiple, last_layer_subset):
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=61,
    )
    theirs = random_state_dict(transformers.BertForPreTraining(config))
    config.pad_vocab_size_multiple, config.last_layer_subset = multiple, last_layer_subset
    config.orig_vocab_size, config.vocab_size = 61, 61 + -61 % multiple
    ours = bert.remap_state_dict(theirs, config)
    assert ours["cls.predictions.decoder.bias"][61:].tolist() == [-100.0] * (-61 % multiple)
    last = "bert.encoder.layers.1.mixer"
    assert (f"{last}.Wkv.weight" in ours) == last_layer_subset != (f"{last}.Wqkv.weight" in ours)
    before = dict(ours)
    back = bert.inv_remap_state_dict(ours, config)
    assert_same(ours, before)
    assert back["bert.embeddings.LayerNorm.gamma"] is theirs["bert.embeddings.LayerNorm.weight"]
    del theirs["cls.predictions.decoder.bias"]  # the same tensor as cls.predictions.bias
    assert_same(bert.remap_state_dict(back, config), ours)
    names = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): tensor
        for name, tensor in back.items()
    }
    assert_same(names, theirs)


def test_megatron():
    config = config_of()
    theirs, ours = {}, gpt_state_dict(config)
    del ours["lm_head.bias"]
    ours["lm_head.weight"] = ours["transformer.embeddings.word_embeddings.weight"]
    del ours["transformer.embeddings.position_embeddings.weight"]
    names = {
        "transformer.embeddings.word_embeddings": "language_model.embedding.word_embeddings",
        "transformer.ln_f": "language_model.encoder.final_layernorm",
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        "mlp.fc1": "mlp.dense_h_to_4h",
        "mlp.fc2": "mlp.dense_4h_to_h",
        "mixer.Wqkv": "self_attention.query_key_value",
        "mixer.out_proj": "self_attention.dense",
        "transformer.layers": "language_model.encoder.layers",
    }
    for name, tensor in ours.items():
        if name == "lm_head.weight":
            continue
        if "Wqkv" in name:  # (three, heads, dim) here, (heads, three, dim) there
            tensor = tensor.unflatten(0, (3, 4, 6)).transpose(0, 1).flatten(0, 2)
        for new, old in names.items():
            name = name.replace(new, old)
        theirs[name] = tensor
    assert_same(gpt.remap_state_dict_megatron(theirs, config), ours)


def test_configurations_that_are_not_computed():
    llama_config = transformers.LlamaConfig
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    for convert, config, words in (
        (
            llama.llama_config_to_gpt2_config,
            llama_config(rope_parameters=scaled),
            "rope_type of LlamaConfig: expected 'default', got 'linear'",
        ),
        (
            llama.llama_config_to_gpt2_config,
            llama_config(head_dim=64),
            "head_dim of LlamaConfig: expected 128 or None, got 64",
        ),
        (
            llama.llama_config_to_gpt2_config,
            llama_config(hidden_act="gelu"),
            "hidden_act of LlamaConfig: expected 'silu', got 'gelu'",
        ),
        (
            falcon.falcon_config_to_gpt2_config,
            transformers.FalconConfig(alibi=True),
            "alibi of FalconConfig: expected False, got True",
        ),
        (
            opt.opt_config_to_gpt2_config,
            transformers.OPTConfig(layerdrop=0.1),
            "layerdrop of OPTConfig: expected 0.0, got 0.1",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            convert(config)


def test_names_of_other_versions_of_transformers():
    old = transformers.GPTNeoXConfig()
    old.rotary_emb_base, old.rotary_pct = 20000, 0.5
    config = gpt_neox.gpt_neox_config_to_gpt2_config(old)
    assert (config.rotary_emb_base, config.rotary_emb_fraction) == (20000, 0.5)
    published = SimpleNamespace(
        **transformers.FalconConfig(bias=False).to_dict(), n_layer=3, n_head=71, n_head_kv=8
    )
    del published.new_decoder_architecture, published.num_attention_heads
    config = falcon.falcon_config_to_gpt2_config(published)
    assert (config.n_layer, config.n_head, config.n_head_kv) == (3, 71, 8)
    assert not config.parallel_block_tied_norm


def test_a_configuration_that_says_nothing_of_rotary_embeddings():
    attributes = transformers.LlamaConfig().to_dict()
    for name in ("rope_parameters", "head_dim", "tie_word_embeddings"):
        del attributes[name]
    config = llama.llama_config_to_gpt2_config(SimpleNamespace(**attributes))
    assert config.rotary_emb_base == 10000.0 and not config.tie_word_embeddings


def test_names_end_at_dots():
    names = {"layers.#.norm": "layers.#.n", "layers.#.bias": None}
    kept = {"layers.12.norm_1.weight": numbered(1), "layers.12.bias_1": numbered(2)}
    given = {"layers.12.norm.weight": numbered(3), "layers.12.bias": numbered(4), **kept}
    renamed = _remap.rename(given, names)
    assert_same(renamed, {"layers.12.n.weight": numbered(3), **kept})


def test_configurations_of_code_that_is_not_in_transformers():
    common = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    common.update(vocab_size=61, initializer_range=0.02, bos_token_id=1, eos_token_id=2)
    small = SimpleNamespace(**common, intermediate_size=128, rms_norm_eps=1e-6, pad_token_id=0)
    config = baichuan.baichuan_config_to_gpt2_config(small)
    assert config.rotary_emb_fraction == 1.0 and not config.use_alibi and not config.norm_head
    large = SimpleNamespace(**{**vars(small), "hidden_size": 5120, "vocab_size": 125696})
    config = baichuan.baichuan_config_to_gpt2_config(large)
    assert config.rotary_emb_fraction == 0.0 and config.use_alibi and config.norm_head
    config = btlm.btlm_config_to_gpt2_config(
        SimpleNamespace(
            **common,
            position_embedding_type="alibi",
            n_positions=32,
            n_inner=96,
            activation_function="swiglu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            layer_norm_epsilon=1e-5,
            mup_width_scale=0.25,
            mup_embeddings_scale=14.6,
            mup_output_alpha=2.2,
            mup_scale_qk_dot_by_d=True,
        )
    )
    assert (config.n_positions, config.mup_output_multiplier) == (0, 2.2)
    assert config.use_alibi and config.use_flash_attn


TENSORS = {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.float16)}


def write(folder, kind: str, parts: bool) -> None:
    from safetensors.torch import save_file

    save = save_file if kind == "model.safetensors" else torch.save
    if not parts:
        save(TENSORS, str(folder / kind))
        return
    stem, suffix = kind.rsplit(".", 1)
    files = {name: f"{stem}-{name}.{suffix}" for name in TENSORS}
    for name, file in files.items():
        save({name: TENSORS[name]}, str(folder / file))
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("parts", [False, True])
def test_read_from_a_folder(tmp_path, kind, parts, monkeypatch):
    write(tmp_path, kind, parts)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_same(state_dict_from_pretrained(str(tmp_path)), TENSORS)
    half = state_dict_from_pretrained(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert_same(half, {name: tensor.bfloat16() for name, tensor in TENSORS.items()})
    moved = state_dict_from_pretrained(str(tmp_path), device=torch.device("meta"))
    assert all(tensor.is_meta for tensor in moved.values())


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=f"Model name {tmp_path} was not found: expected one of pyto"):
        state_dict_from_pretrained(str(tmp_path))
    write(tmp_path, "pytorch_model.bin", True)
    (tmp_path / "pytorch_model-b.bin").unlink()
    with pytest.raises(OSError, match=r"lists pytorch_model-b.bin, not found in"):
        state_dict_from_pretrained(str(tmp_path))
    write(tmp_path, "pytorch_model.bin", False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils.hub", None)
    with pytest.raises(ImportError, match="'org/name'.* needs the package transformers"):
        state_dict_from_pretrained("org/name")
    with pytest.raises(ImportError, match="GPT2Config needs the package transformers"):
        llama.llama_config_to_gpt2_config(transformers.LlamaConfig())


def test_read_by_name(tmp_path, monkeypatch):
    from transformers.utils import hub

    write(tmp_path, "model.safetensors", True)
    asked = []

    def cached_file(name, file, **kwargs):
        asked.append((name, file))
        return str(tmp_path / file) if (tmp_path / file).exists() else None

    monkeypatch.setattr(hub, "cached_file", cached_file)
    assert_same(state_dict_from_pretrained("org/name"), TENSORS)
    assert asked[0] == ("org/name", "pytorch_model.bin")

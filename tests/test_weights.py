"""Pretrained folders: their weights are those that transformers loads, or the folder is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from distopt.engine import FSDP2
from distopt.models.language_model import LanguageModel, blocks
from tests.harness.distributed import run

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": SIZES | {"tie_word_embeddings": True},
    "mixtral": SIZES | {"num_local_experts": 12},  # more than ten: sorted by number, not by letters
    "qwen2_moe": SIZES
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2},
    "deepseek_v3": SIZES
    | {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
IDS = torch.arange(24).reshape(2, 12)


def made(family: str) -> PreTrainedModel:
    """A small model of a family, with values that its own initialisation would not give."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **FAMILIES[family], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def loaded(folder: Path, **config: Any) -> tuple[PreTrainedModel, LanguageModel]:
    """The model of a folder as an engine fills it: one unit after the other."""
    language_model = LanguageModel(path=str(folder), config=config)
    model = language_model.empty(language_model.describe(1))
    for unit in (*blocks(model), model):
        language_model.fill(model, unit, torch.device("cpu"))
    return model.eval(), language_model


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors in a folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_model_that_was_saved(tmp_path: Path, family: str) -> None:
    """Mixtures of experts are kept expert by expert on disk, stacked in memory; DeepSeek's gate has a saved buffer."""
    model = made(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    ours, language_model = loaded(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert language_model.notes == []
    for other in (ours, theirs):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def filled_by_shares(folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    """The share of the bytes that this rank has read, and the weights of the model under FSDP2."""
    language_model, engine = LanguageModel(path=str(folder)), FSDP2()
    model = language_model.empty(language_model.describe(1))
    cpu = torch.device("cpu")
    engine.build(
        model, blocks(model), lambda unit, device: language_model.fill(model, unit, device, share=engine.share()), cpu
    )
    size = sum(value.nbytes for value in load_file(folder / "model.safetensors").values())
    assert language_model._weights is not None
    full = {
        name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in model.state_dict().items()
    }
    return language_model._weights.bytes_read / size, {name: value.numpy() for name, value in full.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_each_rank_reads_its_own_rows(tmp_path: Path, family: str) -> None:
    made(family).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for share, weights in run(3, filled_by_shares, tmp_path):  # 11 experts of Mixtral are 4, 4 and 3
        assert share <= 1.3 / 3
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            assert np.array_equal(value, expected[name].numpy()), name


def test_rows_that_another_rank_reads_are_not_a_number(tmp_path: Path) -> None:
    """So that an engine that shards otherwise than by rows is found by its first loss."""
    made("mixtral").save_pretrained(tmp_path)
    language_model = LanguageModel(path=str(tmp_path))
    model = language_model.empty(language_model.describe(1))
    for unit in (*blocks(model), model):
        language_model.fill(model, unit, torch.device("cpu"), share=(1, 4))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    partial = 0
    for name, value in model.state_dict().items():
        own = value.chunk(4)[1]
        assert torch.equal(own, expected[name].chunk(4)[1]), name
        others = [each for i, each in enumerate(value.chunk(4)) if i != 1]
        partial += all(each.isnan().all() for each in others)
    assert partial > 10


def quantized_fp8(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n, t in tensors.items() if t.ndim == 2 and "proj" in n]:
            scale = tensors[name].abs().amax() / 448
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)

    edit(folder, change)
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


@pytest.mark.skipif(not hasattr(HfQuantizer, "get_load_operations"), reason="transformers 5.20 is refused instead")
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_fp8_is_dequantized_as_transformers_does(tmp_path: Path, family: str) -> None:
    """Taken for numbers, the codes were up to 448 times the weights, and nothing said so."""
    model = made(family)
    model.save_pretrained(tmp_path)
    quantized_fp8(tmp_path)
    ours, _ = loaded(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], theirs.state_dict()[name]), name
        assert (ours.state_dict()[name] - tensor).abs().max() < 0.03, name
    assert not hasattr(ours.config, "quantization_config")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantization_config in config.json: bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, r"quantization_config in config.json: gptq.*save_pretrained"),
        ({"quant_method": "nonsense"}, "quantization_config in config.json: nonsense"),
        (None, r"mlp\.down_proj\.weight is float8_e4m3fn in .*, without a quantization_config"),
    ],
    ids=lambda x: str(x and x.get("quant_method")) if not isinstance(x, str) else "",
)
def test_other_quantizations_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    made("llama").save_pretrained(tmp_path)
    quantized_fp8(tmp_path)
    edit(tmp_path, lambda tensors: [tensors.pop(name) for name in [*tensors] if "scale" in name and config is None])
    configure(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match=message):
        LanguageModel(path=str(tmp_path)).check()


BLOCK = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "extra",
    [
        f"{BLOCK}.bias",  # Qwen2's, under a config.json of Llama
        f"{BLOCK}.weight_scale_inv",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.mlp.up_proj.weight",  # a layer more
        "lm_head.bias",
    ],
)
def test_what_a_file_has_and_the_model_would_leave_out_is_refused(tmp_path: Path, extra: str) -> None:
    made("llama").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({extra: torch.ones(32)}))
    with pytest.raises(ValueError, match=f"has {extra}, which LlamaForCausalLM does not use: its config.json"):
        LanguageModel(path=str(tmp_path)).check()


def test_heads_beside_the_model_are_told(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    extra = {"v_head.summary.weight": torch.ones(1, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit(tmp_path, lambda tensors: tensors.update(extra))
    _, language_model = loaded(tmp_path)
    assert language_model.notes == [f"{tmp_path} has v_head.summary.weight, which LlamaForCausalLM does not need"]


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    """Read into one tensor, the last one would win."""
    made("llama").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    loaded(tmp_path)
    edit(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"other weights for lm_head.weight than for model.embed_tokens.weight"):
        loaded(tmp_path)
    untied, _ = loaded(tmp_path, tie_word_embeddings=False)
    assert not torch.equal(untied.lm_head.weight, untied.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 40), r"model\.safetensors cannot be read .* download"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors there"),
        (
            lambda f: (
                (f / "model.safetensors").rename(f / "x") and (f / "model.safetensors.index.json").write_text("{")
            ),
            r"index\.json is no index of safetensors files",
        ),
        (lambda f: configure(f, num_hidden_layers="two"), "config.json cannot be used"),
        (lambda f: configure(f, model_type="t5"), "t5 is no family of causal language models"),
    ],
    ids=["truncated", "gone", "index", "config", "not causal"],
)
def test_damaged_folders_are_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    made("llama").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        LanguageModel(path=str(tmp_path)).check()


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        ({"attention_dropout": 0.25}, lambda c: c.attention_dropout == 0.25),
        ({"rope_parameters": {"rope_theta": 5e5}}, lambda c: c.rope_parameters["rope_theta"] == 5e5),
        ({"attn_implementation": "eager"}, lambda c: c._attn_implementation == "eager"),
        ({"num_hidden_layers": 2}, lambda c: c.num_hidden_layers == 2),  # what it is already
    ],
    ids=["dropout", "rope", "attention", "same"],
)
def test_options_are_merged_into_a_pretrained_configuration(tmp_path: Path, config: Any, seen: Any) -> None:
    """They were ignored, and recorded as if they held."""
    made("llama").save_pretrained(tmp_path)
    model, _ = loaded(tmp_path, **config)
    assert seen(model.config) and model.config.rope_parameters["rope_type"] == "default"
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"config": {"num_hidden_layers": 99}},
            r"no weights for model\.layers\.2\..*num_hidden_layers=99, and the sizes",
        ),
        ({"config": {"num_hidden_layers": 1}}, r"has model\.layers\.1\..*num_hidden_layers=1, and the sizes"),
        ({"config": {"hidden_size": 16}}, r"hidden_size=16, and the sizes"),
        ({"config": {"num_attention_heads": 4}}, r"num_attention_heads=4: the weights in .* were trained with 2"),
        ({"config": {"nonsense": 1}}, "model.config.nonsense: LlamaConfig has no such option"),
        ({"config": {"attention_dropuot": 0.1}}, "did you mean attention_dropout?"),
        ({"family": "bert"}, "model.family=bert, and the model in .* is llama"),
    ],
    ids=["more layers", "fewer layers", "width", "heads", "unknown", "misspelt", "family"],
)
def test_what_a_pretrained_model_cannot_become_is_refused(tmp_path: Path, given: Any, message: str) -> None:
    made("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LanguageModel(path=str(tmp_path), **given).check()


@pytest.mark.parametrize("family", ["mixtral", "phi3", "bert", "cohere2", "olmoe"])
def test_any_causal_family_is_made_from_sizes(family: str) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 32}
    language_model = LanguageModel(family, sizes)
    config = language_model.describe(300)
    assert (config.num_hidden_layers, config.vocab_size) == (2, 300)
    assert len(blocks(language_model.empty(config))) >= 2  # BERT's embeddings are one


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("t5", {}, "t5 is no family of causal language models"),
        ("gpt2", {"vocab_size": 10}, "the data has 300 tokens, model.config.vocab_size=10 is less"),
        (
            "gpt2",
            {"activation_function": "nope"},
            "model.config.activation_function=nope: GPT2Config builds no model .*nope",
        ),
        ("llama", {"to_dict": 1}, "model.config.to_dict: LlamaConfig has no such option"),
        ("gpt2", "abc", "model.config must be options by name"),
        (None, {}, "there is no model: give model.family"),
        (3, {}, "model.family must be a model type"),
    ],
)
def test_what_is_no_model_is_refused(family: Any, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        language_model = LanguageModel(family, config)
        language_model.empty(language_model.describe(300))


def test_a_family_that_leaves_weights_as_the_memory_was_is_refused() -> None:
    """transformers' openai-gpt sets its layers in their constructors, which did not run where there was memory."""
    language_model = LanguageModel("openai-gpt", {"n_layer": 1, "n_embd": 16, "n_head": 2})
    model = language_model.empty(language_model.describe(64))
    with pytest.raises(ValueError, match=r"OpenAIGPTLMHeadModel does not initialize transformer\.h\.0\."):
        language_model.fill(model, model, torch.device("cpu"))

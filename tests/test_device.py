"""What a run knows of its device: operations per token by the formula, MFU and memory of a GPU that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from distopt.job import device


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=256))


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=False, **sizes))


def test_operations_per_token() -> None:
    """A tied head counts once, an embedding of its own is only looked up; a frozen weight has no gradient."""
    model = gpt2()
    numel = sum(p.numel() for p in model.parameters())
    attention = 12 * 2 * 16 * 32
    assert device.flops_per_token(model, 32) == 6 * numel + attention
    model.transformer.h.requires_grad_(False)
    frozen = sum(p.numel() for p in model.transformer.h.parameters())
    assert device.flops_per_token(model, 32) == 6 * numel - 2 * frozen + attention
    model = llama()
    used = sum(p.numel() for p in model.parameters()) - 256 * 16
    assert device.flops_per_token(model, 8) == 6 * used + 12 * 3 * 16 * 8


def gpus(count: int, kind: str = "cuda") -> Any:
    return SimpleNamespace(device=torch.device(kind), num_processes=count)


def test_a_gpu_has_memory_and_a_known_one_a_share_of_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = gpt2(), ["NVIDIA H200"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=141 * 2**30))
    flops = device.flops_per_token(model, 32) or 0
    speed = 0.41 * 989e12 * 2 / flops
    assert device.watch(model, 32, True, gpus(2))(speed) == {"mfu": 0.41, "device_gib": 1.5}
    assert device.watch(model, 32, False, gpus(2))(speed) == {"device_gib": 1.5}
    assert device.described(gpus(2)) == "2 processes on NVIDIA H200, 141 GiB"
    name[0] = "Some GPU"
    assert device.watch(model, 32, True, gpus(2))(speed) == {"device_gib": 1.5}
    assert device.watch(model, 32, True, gpus(1, "cpu"))(speed) == {}

"""Command lines that once ended in a traceback, in a line without the key, or in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.harness.fuzz.case import EITHER, REFUSED, Case
from tests.harness.fuzz.data_files import CHAT, TEXT

_OF_MODEL = ("model.path=model", "data=chat", "data.path=chat.jsonl", "train.sequence_length=32")
_FILES = {"chat.jsonl": b"\n".join(CHAT), "lines.jsonl": b"\n".join(TEXT)}
# The words, and what the line has to hold.
_REFUSED = {
    "param_groups.overrides={wte:{learning_rate:1}}": "learning_rate",
    "param_groups.overrides={wte:{foo:1}}": "foo",
    "param_groups.overrides={wte:{initial_lr:5}}": "initial_lr",
    "param_groups.overrides={wte:{params:[]}}": "params",
    "engine=zero1 engine.overlap_gather=abc": "overlap_gather",
    "engine=zero1 engine.overlap_gather=null": "overlap_gather",
    "sam=functional sam.precondition=same": "precondition",
    "engine=deepspeed_zero1 engine.stage=true": "stage",
    "optimizer=[adamw,lamb]": "optimizer",
    "name={a:1}": "name",
    "data=chat data.path=chat.jsonl data.ignore=abc": "ignore",
    "data=chat data.path=chat.jsonl data.ignore=null": "ignore",
    "data=chat data.path=chat.jsonl data.ignore=3": "ignore",
    "data=chat data.path=chat.jsonl data.validation_fraction=abc": "validation_fraction",
    "data=jsonl data.path=lines.jsonl data.field=[a]": "field",
    "data=jsonl data.path=lines.jsonl data.field={a:1}": "field",
    "data.tokenizer=1": "tokenizer",
    "data.tokenizer=nan": "tokenizer",
    "data.tokenizer=[a]": "tokenizer",
    "data.cache_dir=1": "cache_dir",
    "data.cache_dir=[1]": "cache_dir",
    "trackers=1": "trackers",
    "trackers=true": "trackers",
    "model.family=1": "family",
    "model.family=[a]": "family",
    "model.config=3": "model.config",
    "model.path=1": "model.path",
    "adapter=lora adapter.target_modules=[1]": "target_modules",
    "adapter=lora adapter.target_modules='('": "target_modules",
    "adapter=lora adapter.target_modules=true": "target_modules",
    "adapter=lora adapter.target_modules=1": "target_modules",
    "adapter=lora adapter.target_modules=[lm_head]": "adapter=lora",
    "+param_groups.foo=1": "foo",
    "train.timeout_minutes=1e18": "timeout_minutes",
    "train.timeout_minutes=1e-9": "timeout_minutes",
    "+model.config.vocab_size=10": "vocab_size",
    "+model.config.activation_function=nope": "activation_function",
    "+model.config.resid_pdrop=nan": "resid_pdrop",
    "+model.config.resid_pdrop=-1": "resid_pdrop",
    "model=llama_tiny model.config.num_key_value_heads=3": "num_key_value_heads",
    "model=llama_tiny +model.config.rope_parameters={rope_type:nope,rope_theta:1e4}": "rope",
    "optimizer._target_=builtins.dict": "optimizer",
    "model._target_=builtins.dict": "model",
    "optimizer._partial_=abc": "optimizer",
    "+engine._partial_=true": "engine",
    "+optimizer._recursive_=abc": "optimizer",
    "schedule._target_=distopt.AdamW": "schedule",
    "sam=on sam._target_=distopt.AdamW": "sam",
    "+optimizer._convert_=nope": "optimizer",
    "schedule.final_lr_ratio=abc": "final_lr_ratio",
    "schedule.final_lr_ratio=null": "final_lr_ratio",
    "schedule.final_lr_ratio=[1]": "final_lr_ratio",
    "engine=zero1 engine.reduce_dtype=[fp32]": "reduce_dtype",
    "param_groups=3": "param_groups",
    "train.resume=": "train.resume",
    "train.resume='~'": "train.resume",
    "optimizer=adafactor engine=deepspeed_zero1": "engine",
    "optimizer=dadapt_sgd engine=deepspeed_zero1": "engine",
    "seed=18446744073709551616": "seed",
    "~optimizer._target_": "optimizer",
    "optimizer._target_=": "optimizer",
    "optimizer=null": "optimizer",
    "engine=null": "engine",
    "data=null": "data",
    "optimizer.lr=${nope}": "optimizer.lr",
    "engine.precision=${nope}": "engine.precision",
    "schedule.warmup_steps=${nope}": "schedule.warmup_steps",
    "data.path=${nope}": "data.path",
    "name='../x'": "name",
    "-x": "-x",
    "--cfg=nope": "--cfg",
    "train.init='~'": "train.init",
    "data=mixture data.path=text.txt": "data.path",
    "hydra.run.dir=/proc/nope": "/proc/nope",
}
_EITHER = (
    *(
        "optimizer.lr=1e30",
        "optimizer.weight_decay=1e20",
        "model.config=null",
        "sam=null",
        "adapter=null",
        "optimizer={lr:1}",
    ),
    *("train.sequence_length=1", "train.batch_size=1", "evaluation.max_sequences=1", "evaluation.prompt=''"),
    "model.family=null",
)


def seeds(model: Path) -> list[Case]:
    """The cases; `model` is the fuzzer's folder of a model."""
    found = [Case(tuple(words.split()), (named,), REFUSED, _FILES) for words, named in _REFUSED.items()]
    found += [Case((word,), (word.partition("=")[0].rpartition(".")[2], "diverged"), EITHER) for word in _EITHER]
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    for changes, named in (
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantiz"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"model_type": "nope"}, "nope"),
        ({"model_type": "nope", "auto_map": {"AutoConfig": "x.Y"}}, "nope"),
        ({"hidden_size": 47}, "hidden_size"),
    ):
        content = json.dumps({**config, **changes}).encode()
        files = {**_FILES, "model/config.json": content}
        found.append(Case(_OF_MODEL, (named, "config.json"), REFUSED, files, "model"))
    for content in (b"[]", b"{}", b"null"):
        found.append(Case(_OF_MODEL, ("tokenizer",), REFUSED, {**_FILES, "model/tokenizer.json": content}, "model"))
    weights = (model / "model.safetensors").read_bytes()
    for content in (b"", b"text", weights[:100], weights[: len(weights) // 2], None):
        files = {**_FILES, "model/model.safetensors": content}
        found.append(Case(_OF_MODEL, ("model.safetensors", "safetensors"), REFUSED, files, "model"))
    for content in (b"{", b"{}", b"[]", b"null"):
        files = {**_FILES, "model/model.safetensors": None, "model/model.safetensors.index.json": content}
        found.append(Case(_OF_MODEL, ("index.json",), REFUSED, files, "model"))
    return found

"""Exported checkpoints: transformers gets the trained model bit for bit, and the tokens that it was trained on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distopt.bounds import DTYPES
from distopt.checkpoint import save_checkpoint
from distopt.data import tokenizers
from distopt.export import main
from distopt.models import pretrained
from distopt.models.export import export, fitting_tokenizer
from tests.harness import jobs
from tests.harness.cells import some
from tests.harness.checkpoints import sealed
from tests.harness.jobs import metrics, overrides

PROMPT = torch.arange(60).reshape(2, 30)  # ids that every vocabulary here has
TEXT = "It's  naïve\tĀ Ġ ☃😀 Cafe\u0301\r\n\n\0 . , ! 日本語"
LLAMA: dict[str, str | None] = {
    "model": "llama_tiny",
    **{f"model__config__{name}": None for name in ("n_layer", "n_head", "n_embd", "n_positions")},
    "model__config__num_hidden_layers": "2",
    "model__config__num_attention_heads": "2",
    "model__config__num_key_value_heads": "1",
    "model__config__hidden_size": "16",
    "model__config__intermediate_size": "40",
    "model__config__max_position_embeddings": "64",
}
UNTIED = {**LLAMA, "model__config__tie_word_embeddings": "false", "data__tokenizer": "words"}
# A mixture of experts: stacked in memory, and expert by expert on disk. Another family than that of the choice.
MIXTRAL: dict[str, str | None] = {
    **{f"model__config__{name}": None for name in ("n_layer", "n_head", "n_embd", "n_positions")},
    "model__family": "mixtral",
    "model__config": "{num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, hidden_size: 16, "
    "intermediate_size: 40, num_local_experts: 3, max_position_embeddings: 64, tie_word_embeddings: true}",
}
RUNS: dict[str, tuple[int, dict[str, str | None]]] = {
    "gpt2": (1, {"engine": "ddp"}),
    "llama": (2, {"engine": "fsdp2", **LLAMA}),
    "untied": (2, {"engine": "fsdp2", **UNTIED}),  # with a tokenizer
    "mixtral": (2, {"engine": "fsdp2", **MIXTRAL}),
}


def keep_logits(file: str) -> None:
    """Writes the logits of the trained model, as the run's own engine computes them."""
    from distopt.job import summary as program

    original = program.sample

    def sample(engine: Any, model: Any, *args: Any) -> Any:
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=PROMPT).logits
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(logits, file)
        return original(engine, model, *args)

    program.sample = sample


def write_tokenizer(folder: Path, text: str) -> None:
    """A byte-level BPE of 300 tokens, whose text ends with a token of its own, with two chat templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", model_max_length=64)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of the table, and what their models said at the end. The tokenizer's folder is gone."""
    cwd = tmp_path_factory.mktemp("trained")
    write_tokenizer(cwd / "words", jobs.write_text(cwd).read_text())
    for name, (world, changes) in RUNS.items():
        words = overrides(name=name, **changes)
        ended = jobs.run(cwd, words, world, keep_logits, str(cwd / f"{name}.pt"))
        assert [rank.code for rank in ended] == [0] * world, "\n".join(rank.err for rank in ended)
    (cwd / "words").rename(cwd / "words of old")
    return cwd


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    """`main` leaves SIGTERM and logging switched off, in a process that continues here."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", RUNS)
def test_the_exported_model_is_the_trained_one_bit_for_bit(trained: Path, tmp_path: Path, name: str) -> None:
    checkpoint = shutil.copytree(trained / "runs" / name / "checkpoints" / "step_00000012", tmp_path / "elsewhere")
    export(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(input_ids=PROMPT).logits, torch.load(trained / f"{name}.pt"))
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings == (name != "untied")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (name == "untied")  # noqa: SIM118
    assert model.config.use_cache

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == 0
    if name == "untied":
        original = AutoTokenizer.from_pretrained(trained / "words of old")
        assert tokenizer.encode(TEXT) == original.encode(TEXT) != list(TEXT.encode())
        assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<end>", 64)
        assert tokenizer.chat_template == original.chat_template and len(tokenizer.chat_template) == 2
    else:
        assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("name", some(["untied"], ["gpt2", "untied", "mixtral"]))
def test_a_run_starts_from_an_export_where_the_first_one_ended(trained: Path, name: str) -> None:
    """Its tokenizer too comes from there."""
    out, (world, changes) = trained / f"{name} again", RUNS[name]
    export(trained / "runs" / name, out)
    changes = {**changes, "model__path": f"'{out}'", "name": f"{name}-again"}
    if name == "untied":
        changes["data__tokenizer"] = None
    if name == "mixtral":
        changes |= {"model__family": None, "model__config": None}
    ended = jobs.run(trained, overrides(**{**changes, "train__steps": "1", "schedule__warmup_steps": "0"}), world)
    assert [rank.code for rank in ended] == [0] * world, ended[0].err
    first, again = (
        [row["validation_loss"] for row in metrics(trained / "runs" / run) if "validation_loss" in row]
        for run in (name, f"{name}-again")
    )
    assert again[0] == first[-1] < first[0]


def test_the_command(trained: Path, tmp_path: Path) -> None:
    """Of a run it takes the newest checkpoint that is complete, and says so; it ends with how to load what it wrote."""
    run = shutil.copytree(trained / "runs" / "llama", tmp_path / "run")
    next((run / "checkpoints" / "step_00000012").glob("*/shard-00001.bin")).unlink()
    ended = jobs.python("-m", "distopt.export", run, tmp_path / "new" / "out", "--dtype", "bfloat16")
    assert ended.code == 0, ended.err
    assert "passed over step_00000012: shard-00001.bin is missing" in ended.err
    assert "Traceback" not in ended.err and "Warning" not in ended.err
    line = ended.out.strip().splitlines()[-1]
    out = tmp_path / "new" / "out"
    assert line.startswith(f"wrote {out} from step_00000008: ") and " in bfloat16; " in line
    assert line.endswith(f"AutoModelForCausalLM.from_pretrained('{out}'), the tokenizer by AutoTokenizer")
    export(run / "checkpoints", tmp_path / "whole")
    half, whole = (AutoModelForCausalLM.from_pretrained(path) for path in (out, tmp_path / "whole"))
    assert (half.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.bfloat16())


def test_a_killed_export_leaves_nothing_of_that_name(trained: Path, tmp_path: Path) -> None:
    fatal = (
        "import os, distopt.export as e, distopt.models.export as m; "
        "m.fitting_tokenizer = lambda _: os.kill(os.getpid(), 9); e.main()"
    )
    ended = jobs.python("-c", fatal, trained / "runs" / "gpt2", tmp_path / "out")
    assert ended.code == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.exporting"]
    (tmp_path / "out.exporting" / "left over").touch()
    export(trained / "runs" / "gpt2", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "left over").exists()


def not_of_the_job(folder: Path) -> Path:
    model = torch.nn.Linear(2, 2)
    return save_checkpoint(folder / "other", model, torch.optim.SGD(model.parameters(), lr=1.0))


def garbage(folder: Path) -> Path:
    """Files as long as they were, with something else in them."""
    return zeros(folder, "shard-00000.bin")


def garbled_index(folder: Path) -> Path:
    return zeros(folder, "index.json")


def garbled_tokenizer(folder: Path) -> Path:
    return zeros(folder, "tokenizer.json")


def garbled_config(folder: Path) -> Path:
    return zeros(folder, "config.json")


def zeros(folder: Path, name: str) -> Path:
    (file,) = (folder / "step").glob(f"*/{name}")
    file.write_bytes(bytes(file.stat().st_size))
    return folder / "step"


def truncated(folder: Path) -> Path:
    file = next((folder / "step").glob("*/shard-*.bin"))
    file.write_bytes(file.read_bytes()[:-1])
    return folder / "step"


def other_config(folder: Path) -> Path:
    """Of another model."""

    def change(_: dict[str, Any], files: Path) -> None:
        text = (files / "config.json").read_text()
        (files / "config.json").write_text(text.replace('"n_layer": 2', '"n_layer": 3'))

    sealed(folder / "step", change)
    return folder / "step"


def no_checkpoint(folder: Path) -> Path:
    (folder / "run" / "checkpoints").mkdir(parents=True)
    return folder / "run"


REFUSED = {
    "missing": (lambda folder: folder / "nowhere", "nowhere: no such folder; give a run, as runs/book"),
    "not of the job": (not_of_the_job, "other contains no config.json: it was not written by this version of"),
    "garbage": (garbage, "step: shard-00000.bin is not as it was written: the checkpoint is damaged"),
    "garbled index": (garbled_index, "step: index.json is not as it was written: the checkpoint is damaged"),
    "garbled tokenizer": (garbled_tokenizer, "step: tokenizer.json is not as it was written"),
    "garbled config": (garbled_config, "step: config.json is not as it was written"),
    "truncated": (truncated, "bytes, the manifest says "),
    "another model": (other_config, "transformer.h.2.ln_1.weight is in the model, not in the checkpoint"),
    "a run without one": (no_checkpoint, "run/checkpoints has no complete checkpoint: it is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    make, expected = REFUSED[name]
    shutil.copytree(trained / "runs" / "gpt2" / "checkpoints" / "step_00000012", tmp_path / "step")
    monkeypatch.setattr(sys, "argv", ["export", str(make(tmp_path)), str(tmp_path / "out")])
    caplog.clear()  # of what saving says
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("distopt: error: ") and expected in line
    assert not caplog.records
    assert not list(tmp_path.glob("out*"))


def test_what_is_there_stays(trained: Path, tmp_path: Path) -> None:
    """An empty folder is taken; a file, or a folder with something in it, is not."""
    checkpoint = trained / "runs" / "gpt2"
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="exists and is not an empty folder: choose another name"):
            export(checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    export(checkpoint, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_dtype_is_one_of_three(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "a", "b", "--dtype", "int8"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert [name for name in DTYPES if name not in err] == []


def test_float16_is_refused_where_it_is_too_small(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=256, n_layer=1, n_head=1, n_embd=4, n_positions=8)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.transformer.wpe.weight[3, 2] = 1e5
    files = pretrained.description(config, tokenizers.Bytes().pretrained())
    save_checkpoint(tmp_path / "a", model, torch.optim.SGD(model.parameters(), lr=1.0), files=files)
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight is too large for float16: choose bfloat16"):
        export(tmp_path / "a", tmp_path / "out", torch.float16)
    export(tmp_path / "a", tmp_path / "out", torch.bfloat16)


# Tokenizers


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_bytes_as_a_tokenizer(tmp_path: Path, family: str) -> None:
    """U+0100 is GPT-2's character for the byte 0: as a letter in the text it was taken for the end of a document."""
    tokenizers.Bytes().pretrained().save_pretrained(tmp_path)
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(tokenizer), tokenizer.vocab_size, tokenizer.eos_token_id) == (256, 256, 0)
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000, 7), *range(0x10000, 0x110000, 997)]))
    for text in ("", " ", "Ā", "Māori Ābols", TEXT, every):
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer(["ab", "é"])["input_ids"] == [[97, 98], [195, 169]]
    assert tokenizer.decode([65, 200, 66]) == tokenizers.Bytes().decode([65, 200, 66]) == "A\ufffdB"
    assert tokenizer.decode([65, 0], skip_special_tokens=True) == "A"


def test_a_family_that_would_read_the_tokenizer_otherwise(tmp_path: Path) -> None:
    """For Qwen2 AutoTokenizer composes characters before it encodes, whatever tokenizer.json says."""
    tokenizer = tokenizers.Bytes().pretrained()
    for family, expected in (("gpt2", "AutoTokenizer"), ("qwen2", "PreTrainedTokenizerFast")):
        tokenizer.save_pretrained(tmp_path)
        AutoConfig.for_model(family).save_pretrained(tmp_path)
        assert fitting_tokenizer(tmp_path) == expected
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).encode(TEXT) == list(TEXT.encode())
    assert AutoTokenizer.from_pretrained(tmp_path).encode(TEXT) != list(TEXT.encode())


def test_a_pretrained_model_keeps_how_it_ends(tmp_path: Path) -> None:
    """Its own several ends and its generation_config.json, but not where it was trained on with other tokens."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 0], "top_k": 7}')
    bytes_ = tokenizers.Bytes().pretrained()
    for known, kept in (([5, 0], True), (5, False)):
        config = AutoConfig.for_model("llama", eos_token_id=known, bos_token_id=1, use_cache=False)
        files = pretrained.description(config, bytes_, tmp_path)
        described = json.loads(files["config.json"])
        assert (described["eos_token_id"], described["bos_token_id"]) == ((known, 1) if kept else (0, None))
        assert ("generation_config.json" in files) == kept
        assert described["use_cache"] and (config.eos_token_id, config.use_cache) == (known, False)

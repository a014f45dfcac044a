"""Every YAML of conf/: it composes, makes what it names, and what it makes works. The tables are listings of conf/."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from distopt import SAM, param_groups
from distopt.engine import Engine
from distopt.job.components import Components
from distopt.models.language_model import LanguageModel, blocks
from distopt.optim.mixed import split_of
from distopt.optim.options import OWN
from distopt.sam.rho_schedule import RhoOptions
from tests.harness.jobs import write_text
from tests.harness.pretrained import chats, write_lines, write_tokenizer

CONF = Path(__file__).parents[1] / "conf"
GROUPS = {folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()}
every_choice = pytest.mark.parametrize(("group", "choice"), [(g, c) for g, names in GROUPS.items() for c in names])


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """The configuration of a command; the same object for the same words, so not to be changed."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


LONGEST = max(len(names) for group, names in GROUPS.items() if group != "experiment")


def together(row: int) -> DictConfig:
    """A configuration with the choices of this row of every group, the first ones again where a group has fewer."""
    words = []
    for group, names in GROUPS.items():
        if group != "experiment":
            choice = names[row % len(names)]
            words.append(f"{group}={choice}")
    return composed(*words)


def having(group: str, choice: str) -> DictConfig:
    """A configuration with a choice, composed with choices of all other groups; not to be changed."""
    return together(GROUPS[group].index(choice))


def made(group: str, choice: str, *overrides: str) -> Any:
    cfg = composed(f"{group}={choice}", *overrides) if overrides else having(group, choice)
    return instantiate(cfg[group])


def choices(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("choice", GROUPS[group])


def test_every_file_is_in_a_group() -> None:
    files = {file.relative_to(CONF).as_posix() for file in CONF.rglob("*") if file.is_file()}
    assert files == {"train.yaml", "plan.yaml"} | {
        f"{group}/{choice}.yaml" for group, names in GROUPS.items() for choice in names
    }
    assert set(GROUPS) >= {"data", "engine", "experiment", "model", "optimizer", "sam", "schedule"}


def targets(node: Any) -> Iterator[dict[str, Any]]:
    """Everything that Hydra would instantiate, however deep."""
    if isinstance(node, dict) and "_target_" in node:
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(child)


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.relative_to(CONF).as_posix())
def test_what_is_made_gets_lists_and_dictionaries_of_python(file: Path) -> None:
    """OmegaConf's own break the loading of checkpoints, and whatever asks for a list."""
    found = list(targets(OmegaConf.to_container(OmegaConf.load(file))))
    assert [node["_target_"] for node in found if node.get("_convert_") != "all"] == []
    assert len(found) == file.read_text().count("_target_:")


EVERYTHING = [*range(LONGEST), *(f"experiment={choice}" for choice in GROUPS["experiment"])]


@pytest.mark.parametrize("what", EVERYTHING)
def test_composes_and_instantiates(what: int | str) -> None:
    cfg = together(what) if isinstance(what, int) else composed(what)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for name in set(GROUPS) - {"experiment"}:
        if cfg[name]:
            instantiate(cfg[name])
    instantiate(cfg.param_groups)


@every_choice
def test_names_every_argument(group: str, choice: str) -> None:
    """Hydra refuses a key that the YAML lacks, so an argument that is missing there could only be set by `+`."""
    cfg = having(group, choice)[group] if group != "experiment" else None
    if not cfg:
        return
    parameters = inspect.signature(get_object(cfg._target_)).parameters
    arguments = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    given = set(cfg) - {"_target_", "_partial_", "_convert_"}
    from_the_program = (
        {"params", "optimizer", "total_steps", "model", "logits", "labels"} if cfg.get("_partial_") else set()
    )
    # Of one kind of source only; the job captures no CUDA graph; and what it connects a monitor with.
    connected = {"model", "others", "reload", "on_alarm", "on_step"}
    optional = {"data": {"field", "suffixes", "files"}, "optimizer": {"capturable"}, "health": connected}.get(
        group, set()
    )
    # Options of every optimizer, and of SAM's whole family, which no signature lists.
    of_all = {"optimizer": {*OWN}, "sam": {*RhoOptions.__annotations__}}.get(group, set())
    assert given <= arguments | of_all
    assert arguments - given <= from_the_program | optional


@every_choice
def test_begins_with_what_it_is_for_or_names_its_target(group: str, choice: str) -> None:
    first = (CONF / group / f"{choice}.yaml").read_text().splitlines()[0]
    assert first.startswith(("# ", "_target_: distopt."))


def tiny() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4))
    return model, torch.randn(64, 8), torch.randint(0, 4, (64,))


# What a SAM needs the optimizer to have.
BUFFERS = {
    "momentum": {"momentum_buffer", "exp_avg"},
    "preconditioned": {"exp_avg_sq", "square_avg", "sum"},
    "functional": {"exp_avg_sq", "square_avg", "sum"},
}


@pytest.mark.parametrize("choice", sorted({*GROUPS["optimizer"]} - {"mezo"}))  # which takes no gradients
@pytest.mark.parametrize("sam", GROUPS["sam"])
def test_every_optimizer_descends(choice: str, sam: str) -> None:
    """With the learning rate of its YAML, by ten steps on one batch; every parameter moves at the first (by ADOPT at
    the second: its first sets its state; by DAdaptSGD once its steps are no rounding of the weights).

    Those that estimate their rate start from a millionth of it, and take 100 steps, which SAM need not repeat.
    """
    model, x, y = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    around, cfg = having("sam", sam).sam, having("optimizer", choice)  # neither file refers to the other's group
    make = instantiate(cfg.optimizer)
    split = split_of(make([torch.zeros(2, 2)]))
    optimizer = make(param_groups(model, weight_decay=cfg.optimizer.weight_decay, **split))
    if sam in BUFFERS and not BUFFERS[sam] & set(optimizer.rule(optimizer.param_groups[0]).buffers):
        with pytest.raises(ValueError, match="has no"):
            instantiate(around)(optimizer)
        return
    if around:
        optimizer = instantiate(around)(optimizer)
    assert isinstance(optimizer, SAM) == (sam != "off")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        outputs = model(x)
        loss = optimizer.loss(outputs, cross_entropy) if around else cross_entropy(outputs)
        loss.backward()
        return loss

    def cross_entropy(outputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, y)

    first = {"adopt": 2, "dadapt_sgd": 30}.get(choice, 1)
    losses = [optimizer.step(closure).item() for _ in range(first)]
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))
    if "d0" in cfg.optimizer and sam != "off":
        return
    losses += [optimizer.step(closure).item() for _ in range(100 if "d0" in cfg.optimizer else 10)]
    assert losses[-1] < losses[0] - 0.01


@choices("optimizer")
def test_every_optimizer_decays_by_its_own_number(choice: str) -> None:
    """train.yaml hands the optimizer's weight decay to the param groups, which would otherwise have another."""
    cfg = having("optimizer", choice).copy()
    cfg.optimizer.weight_decay = 0.25
    groups = instantiate(cfg.param_groups)(tiny()[0])
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]


FIELDS = {
    "ddp": {},
    "fsdp2": {"reshard_after_forward": True, "replicas": 1, "sync_each_batch": True},
    "zero2": {"reshard_after_forward": False, "replicas": 1},
    "hsdp": {"reshard_after_forward": True, "replicas": 2},
}


@choices("engine")
def test_every_engine(choice: str) -> None:
    cfg = having("engine", choice).engine
    engine = instantiate(cfg)
    assert isinstance(engine, Engine)
    assert {name: getattr(engine, name) for name in FIELDS.get(choice, {})} == FIELDS.get(choice, {})
    engine.check(world=4)
    for precision in ("fp32", "bf16"):
        assert instantiate(cfg, precision=precision).bf16 == (precision == "bf16")
    with pytest.raises(Exception, match=r"engine\.precision must be one of auto, fp32, bf16, got 'fp16'"):
        instantiate(cfg, precision="fp16")


@choices("schedule")
def test_every_schedule(choice: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = made("schedule", choice)(optimizer, total_steps=1000)
    factors = []
    for _ in range(1000):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    warmup = 1 if choice == "constant" else 100
    assert max(factors) == factors[warmup - 1] == 1.0
    assert factors[0] == 1.0 / warmup
    assert min(factors) >= 0.0


# Vocabulary of the published model, its number of parameters, positions. The tiny ones are for bytes.
MODELS = {
    "gpt2_tiny": (256, 957_184, 1024),
    "gpt2_124m": (50257, 124_439_808, 1024),
    "llama_tiny": (256, 820_352, 1024),
    "llama_1b": (128256, 1_235_814_400, 131072),
    "llama_7b": (32000, 6_738_415_616, 4096),
    "llama_70b": (32000, 68_976_648_192, 4096),
}


def test_the_table_has_every_model() -> None:
    assert {*MODELS, "pretrained"} == {*GROUPS["model"]}  # which is no model without a folder


@pytest.mark.parametrize("choice", MODELS)
def test_every_model_has_its_published_size(choice: str) -> None:
    """On the meta device: 70 billion parameters take no memory."""
    vocabulary, parameters, positions = MODELS[choice]
    language_model = made("model", choice)
    config = language_model.describe(vocabulary)
    model = language_model.empty(config)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (config.max_position_embeddings, config.vocab_size) == (positions, vocabulary)
    comment = (CONF / "model" / f"{choice}.yaml").read_text().splitlines()[0]
    if claimed := re.search(r"([\d.]+)M parameters", comment):
        assert abs(float(claimed[1]) - parameters / 1e6) <= 0.005


SMALL = {
    "gpt2": ("n_layer=1", "n_head=2", "n_embd=16"),
    "llama": (
        "num_hidden_layers=1",
        "num_attention_heads=4",
        "num_key_value_heads=2",
        "hidden_size=16",
        "intermediate_size=32",
    ),
}


@pytest.mark.parametrize("choice", MODELS)
def test_every_model_computes(choice: str) -> None:
    """The same family, cut down: a forward pass with the seed's values."""
    small = SMALL[choice.partition("_")[0]]
    language_model = made("model", choice, *(f"model.config.{word}" for word in small))
    model = language_model.empty(language_model.describe(256))
    for unit in (*blocks(model), model):
        language_model.fill(model, unit, torch.device("cpu"))
    logits = model(input_ids=torch.zeros(2, 8, dtype=torch.int64)).logits
    assert logits.shape == (2, 8, 256) and logits.isfinite().all() and logits.std() > 0


SEE_BOTH_WAYS = {  # families of which transformers makes a model that sees the future, unless it is told not to
    "bert": ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"),
    "electra": ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"),
    "gpt2": ("n_layer", "n_head", "n_embd", "n_inner"),  # and one that never does
}


@pytest.mark.parametrize(("family", "names"), SEE_BOTH_WAYS.items(), ids=SEE_BOTH_WAYS)
def test_no_model_sees_the_token_that_it_is_to_predict(family: str, names: tuple[str, ...]) -> None:
    """BERT learnt to copy the next token: a loss that fell far below what any language model reaches."""
    language_model = LanguageModel(family, dict(zip(names, (1, 2, 16, 32))))
    model = language_model.empty(language_model.describe(64))
    for unit in (*blocks(model), model):
        language_model.fill(model, unit, torch.device("cpu"))
    tokens = torch.arange(16).reshape(2, 8)
    others = torch.cat([tokens[:, :-1], tokens[:, -1:] + 1], dim=1)
    logits, changed = (model.eval()(input_ids=ids).logits for ids in (tokens, others))
    assert torch.equal(logits[:, :-1], changed[:, :-1])
    assert not torch.equal(logits[:, -1], changed[:, -1])


def source(choice: str, folder: Path) -> Path | None:
    """Something that a data source of this name can read; None needs nothing."""
    text = write_text(folder)
    if choice in ("text", "mixture"):
        return text
    if choice in ("jsonl", "stream"):
        file = folder / "lines.jsonl"
        file.write_text("".join(f'{{"text": "{line}"}}\n' for line in text.read_text().splitlines()))
        return file
    if choice == "datasets":
        from datasets import Dataset

        Dataset.from_dict({"text": text.read_text().splitlines()}).save_to_disk(str(folder / "rows"))
        return folder / "rows"
    return None


@pytest.mark.parametrize("choice", sorted({*GROUPS["data"]} - {"chat"}))
def test_every_data_source_gives_text(choice: str, tmp_path: Path) -> None:
    path = source(choice, tmp_path)
    where = [f"data.cache_dir={tmp_path / 'cache'}"] + ([] if path is None else [f"data.path={path}"])
    where = [*where[:1], f"data.sources={{own: {{path: {path}, weight: 1}}}}"] if choice == "mixture" else where
    data = made("data", choice, *where)
    data.check()
    corpus = data.build()
    assert corpus.vocab_size == 256 and corpus.sizes["validation"] > 500
    assert choice == "stream" or corpus.sizes["train"] > corpus.sizes["validation"]
    known, sizes = "def " if path is None else "the ", {"sequence_length": 64, "batch_size": 8}
    batches = data.sequences(corpus, **sizes).batch(0), next(data.validation_sequences(corpus, **sizes).batches())
    assert all(known in corpus.decode(batch.flatten()) for batch in batches)
    if path is not None:
        with pytest.raises(ValueError, match=r"path|sources"):
            made("data", choice).check()


def test_examples_are_read_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    base, path = tmp_path / "base", write_lines(tmp_path / "chats.jsonl", chats(40))
    write_tokenizer(base)
    data = made("data", "chat", f"model.path={base}", f"data.path={path}", f"data.cache_dir={tmp_path / 'cache'}")
    data.check()
    corpus = data.build()
    assert corpus.tokenizer == str(base) and corpus.vocab_size == 400
    sequences = data.sequences(corpus, sequence_length=64, batch_size=4)
    assert "<|user|>\nSay" in corpus.decode(sequences.batch(0).inputs[0])
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        made("data", "chat").check()


@choices("adapter")
def test_every_adapter(choice: str) -> None:
    adapter = made("adapter", choice)
    assert (adapter is None or not adapter) == (choice == "none")
    if choice == "lora":
        model = LanguageModel("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 16})
        empty = model.empty(model.describe(64))
        files = adapter.add(empty, Path("base"))
        trained = [name for name, p in empty.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 4 and all("lora_" in name for name in trained) and set(files)


@choices("experiment")
def test_every_experiment_is_a_run_of_its_own_name(choice: str) -> None:
    cfg = composed(f"experiment={choice}")
    assert cfg.name == choice
    optimizer = instantiate(cfg.optimizer)([nn.Parameter(torch.ones(2, 2))])
    instantiate(cfg.schedule)(optimizer, total_steps=cfg.train.steps)
    config = instantiate(cfg.model).describe(256)
    assert cfg.train.sequence_length <= config.max_position_embeddings
    assert composed(f"experiment={choice}", "train.steps=7", "name=mine").train.steps == 7  # the command line wins


def test_a_pattern_can_be_given_on_the_command_line() -> None:
    """An empty mapping as the default would refuse every key but with `+`, which the comment there does not say."""
    cfg = composed("param_groups.overrides={weight: {lr: 0.5}}")
    groups = instantiate(cfg.param_groups)(tiny()[0])
    assert [group.get("lr") for group in groups] == [None, 0.5, 0.5]


def test_the_configuration_of_an_older_run_is_read() -> None:
    """`distopt.sharpness` ended in a traceback for a run of before the groups `init` and `health`."""
    cfg: Any = OmegaConf.create({key: value for key, value in composed().items() if key not in ("init", "health")})
    assert Components.of(cfg).init is None

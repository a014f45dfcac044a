"""Random command lines: values of every kind for every key, misspelt names, broken words, and random combinations."""

from __future__ import annotations

import functools
import random
import re
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distopt.job.config import CONF
from distopt.job.schema import SECTIONS
from tests.harness.fuzz.case import EITHER, REFUSED, Case
from tests.harness.fuzz.data_files import BAD, CHAT, TEXT

# A key may be the last word of a longer one, so that its line names the section at least.
GROUPS = ("optimizer", "engine", "sam", "health", "schedule", "model", "init", "adapter", "data", "average")
VALUES = (
    *("abc", "''", "null", "true", "false", "[1,2]", "[a]", "[]", "{a:1}", "{}", "nan", "inf", "-inf", "-1", "0", "1"),
    *("0.5", "2", "1e30", "1e-30", "1e400", "9223372036854775807", "9223372036854775808", "1.5", "-0.0", "'1'", "???"),
    *(
        "${nope}",
        "${seed}",
        "${train}",
        "'~'",
        "'../x'",
        "'a b'",
        "ä",
        "[[1]]",
        "[null]",
        "{a:{b:1}}",
        "'\\n'",
        "1_000",
    ),
)
TEXTS = ("abc", "ä", "'a b'", "'~'", "'../x'")
# What would take hours or all memory, rightly; a word of its own starts or asks for other programs.
LARGE = ("9223372036854775807", "1e30")
BROKEN = (
    *(
        "=",
        "a",
        "=1",
        "train.steps",
        "train.steps=",
        "train..steps=1",
        ".train.steps=1",
        "train.steps.=1",
        "{}",
        "~",
        "+",
    ),
    *("optimizer.betas=[0.9", "optimizer.betas=0.9]", "name='x", 'name="x', "name=a\nb", "train.steps=1,2", "~train"),
    *("train.steps==1", "train.steps=1 2", "optimizer@a=adam", "++optimizer=", "~optimizer", "~model.seed", "train=1"),
    *(
        "train=null",
        "train=[1]",
        "checkpoint={}",
        "evaluation=abc",
        "+train.steps=1",
        "hydra.run.dir=",
        "seed=range(0)",
    ),
    *("name=choice(a,b)", "optimizer.lr=interval(0,1)", "optimizer=", "-x", "name=.", "name=a/../../b", "name=${seed}"),
)
LARGE_MODELS = ("gpt2_124m", "llama_1b", "llama_7b", "llama_70b")
# What a choice may be refused for in the tiny run, whatever the value of another key.
UNFIT = {
    "datasets": ("text.txt",),
    "mixture": ("data.sources",),
    "stream": ("text.txt", "data.path"),
    "hsdp": ("engine.replicas",),
    "lora": ("adapter=lora",),
    "warmup_stable_decay": ("decay_steps",),
}
# What these choices of a group need beside them.
WITH = {"mezo": ("train.max_grad_norm=null",), "mup": ("init.base_width=8",)}


@functools.cache
def defaults() -> dict[str, Any]:
    """The keys of the configuration with their values, as they are written."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        values: Any = OmegaConf.to_container(compose("train"))
    found = {}
    for name, value in values.items():
        inner = value if name in SECTIONS and isinstance(value, dict) else {"": value}
        found |= {f"{name}.{key}".rstrip("."): each for key, each in inner.items() if not key.startswith("_")}
    return found


@functools.cache
def keys(group: str, chosen: str) -> dict[str, Any]:
    """The keys of a choice of a group with their values, as they are written."""
    own: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{chosen}.yaml"))
    found: dict[str, Any] = {}
    for base in own.pop("defaults", ()):
        found |= keys(group, base)
    return found | {f"{group}.{key}": each for key, each in own.items() if not key.startswith("_")}


@functools.cache
def choices(group: str) -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in (CONF / group).glob("*.yaml")))


def draw(rng: random.Random) -> Case:
    """A random command line."""
    return rng.choices((value, misspelt, choice, combination, broken), (10, 2, 1, 3, 2))[0](rng)


def value(rng: random.Random) -> Case:
    """A key, of some choice of its group, with a value of any kind."""
    group = rng.choice(GROUPS)
    chosen = rng.choice([name for name in choices(group) if name not in LARGE_MODELS])
    known = keys(group, chosen) if rng.random() < 0.7 else {}
    known = known or {name: value for name, value in defaults().items() if name.partition(".")[0] not in GROUPS}
    key = rng.choice(list(known))
    given = rng.choice(VALUES)
    if given in LARGE and key.partition(".")[0] in ("train", "model", "adapter"):
        given = rng.choice(TEXTS)
    words, files = [f"{group}={chosen}", f"{key}={given}"], {}
    if group == "data" and key != "data.path" and chosen in BAD:
        words.append("data.path=lines.jsonl")
        files["lines.jsonl"] = b"\n".join(TEXT if chosen == "jsonl" else CHAT)
    named = (key.rpartition(".")[2], f"{key}={given}", *(("model.path",) if chosen == "pretrained" else ()))
    named += UNFIT.get(chosen, ()) + (("the run has diverged",) if given in LARGE else ())
    return Case(tuple(words), named, REFUSED if is_wrong(known[key], given) else EITHER, files)


def is_wrong(default: Any, given: str) -> bool:
    """Whether a value is of another kind than the default of its key, so that it has to be refused."""
    if isinstance(default, str) and default.startswith("${"):
        return False
    mapping, listed = given.startswith("{"), given.startswith("[")
    if isinstance(default, bool):
        return given not in ("true", "false", "null", "${seed}")
    if isinstance(default, (int, float)):
        return mapping or listed or given in (*TEXTS, "true", "false", "nan", "''", "${nope}", "${train}", "???")
    if isinstance(default, str):
        return mapping or given in ("${nope}", "???")
    return isinstance(default, list) and (mapping or given in ("5", "true", "${nope}", "???"))


def misspelt(rng: random.Random) -> Case:
    """A key, or the name of a choice, with a letter less, more or other."""
    key = rng.choice(list(defaults()))
    place = rng.randrange(len(key))
    new = key[:place] + rng.choice(("", "x", key[place] * 2)) + key[place + 1 :]
    if new in defaults() or not new.strip("."):
        new = f"{key}x"
    word = f"{rng.choice(('', '', '+'))}{new}=1"
    return Case((word,), (new, new.rpartition(".")[2], new.partition(".")[0]), REFUSED)


def choice(rng: random.Random) -> Case:
    """A group with something that is none of its choices."""
    group = rng.choice(GROUPS)
    given = rng.choice(("nope", "null", "true", "5", "[a,b]", "{a:1}", "''", choices(group)[0] + "x"))
    verdict = REFUSED if given != "null" or group not in ("sam", "adapter", "health", "init", "average") else EITHER
    return Case((f"{group}={given}",), (group,), verdict)


def combination(rng: random.Random) -> Case:
    """Some choices together."""
    words: list[str] = []
    for group in [group for group in GROUPS if group not in ("model", "data", "adapter") and rng.random() < 0.5]:
        chosen = rng.choice(choices(group))
        words += [f"{group}={chosen}", *WITH.get(chosen, ())]
    words += rng.sample(
        (
            *("train.micro_batch_size=2", "train.max_grad_norm=null", "checkpoint.asynchronous=true", "lr_scale=2"),
            *("param_groups.overrides={wte:{lr:1e-4}}", "train.prove_every=1", "checkpoint.best=validation_loss"),
            *(
                "engine.activation_checkpointing=true",
                "checkpoint.keep_every=1",
                "train.lr_range_test=3",
                "adapter=lora",
            ),
        ),
        rng.randrange(3),
    )
    names = re.findall(r"[a-z]\w+", " ".join(words))
    return Case(tuple(dict.fromkeys(words)), tuple(dict.fromkeys(names)))


def broken(rng: random.Random) -> Case:
    """Words that are no key and value, whole or cut anywhere."""
    word = rng.choice(BROKEN)
    if rng.random() < 0.3:
        full = f"{rng.choice(list(defaults()))}={rng.choice(VALUES)}"
        word = full[: rng.randrange(1, len(full))]
    name = word.strip("+~").partition("=")[0].rpartition(".")[2]
    return Case((word,), (name, repr(word), word, "name", "hydra", "KEY=VALUE"), EITHER)

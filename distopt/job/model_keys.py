"""The keys of the configuration on the model, its first values, its adapter and its text, and on a plan's hardware."""

from __future__ import annotations

from distopt import bounds
from distopt.bounds import PATH, POSITIVE, either, integer, or_null, switch
from distopt.bounds.init import BOUNDS as INIT
from distopt.job.key import Key

MODEL_KEYS: dict[str, Key] = {
    "model.family": Key(or_null(bounds.FAMILY), "null: that of `model.path`"),
    "model.config": Key(
        bounds.MODEL_CONFIG,
        "options of the family's configuration, or changes of `model.path`'s",
    ),
    "model.path": Key(or_null(PATH), "a folder written by save_pretrained, or a name on the hub; null: a new model"),
    "model.seed": Key(bounds.SEED, "seed of the first values"),
    "model.attention": Key(or_null(bounds.ATTENTION), "implementation of attention; null: the choice of transformers"),
    "model.chunked_loss": Key(
        or_null(switch()), "compute the loss without the logits of all tokens; null: from 2^28 of a micro-batch on"
    ),
    "model.add_tokens": Key(
        bounds.TOKENS,
        "special tokens that tokenizer and model get in addition; rows of the model are the mean of its own",
    ),
    "model.freeze": Key(bounds.PATTERNS, "regular expressions; parameters whose name one is found in are not trained"),
    "init.scheme": Key(INIT["scheme"], "the initialisation"),
    "init.seed": Key(INIT["seed"], "seed of the first values"),
    "init.fan": Key(INIT["fan"], "which fan the standard deviation is divided by"),
    "init.gain": Key(INIT["gain"], "the standard deviation is gain / sqrt(fan)"),
    "init.std": Key(INIT["std"], "the standard deviation; under muP that in the base model"),
    "init.embedding_std": Key(INIT["embedding_std"], "standard deviation of embeddings"),
    "init.residual": Key(INIT["residual"], "names of projections into the residual stream; null: the usual ones"),
    "init.stds": Key(INIT["stds"], "standard deviations by regular expressions for names, before all other rules"),
    "init.base_width": Key(INIT["base_width"], "muP: hidden size of the base model, whose learning rate is known"),
    "adapter.r": Key(integer(1), "rank of the change"),
    "adapter.alpha": Key(integer(1), "the scale of the change is alpha / r"),
    "adapter.dropout": Key(bounds.DROPOUT, "dropout on the input of the change"),
    "adapter.target_modules": Key(
        bounds.TARGET_MODULES,
        "all-linear, endings of module names, or one regular expression; null: peft's choice for the family",
    ),
    "data.path": Key(
        or_null(PATH),
        "a file, a folder or a dataset's name on the hub; null: the standard library's sources (data=stdlib)",
    ),
    "data.sources": Key(
        or_null(bounds.SOURCES),
        "the texts of a mixture by name: `weight`, its share of all sequences, and `path`, `format`, `field`, "
        "`suffixes`, `files` as below; or `stream: true` with keys of `data=stream`",
        "as {web: {path: web.jsonl, weight: 0.7}, code: {path: src, weight: 0.3}}",
    ),
    "data.format": Key(
        either(bounds.FORMAT, bounds.EXAMPLE_FORMAT),
        "auto, ending: by the file's ending; of examples: by the fields of a row",
    ),
    "data.fields": Key(
        bounds.FIELDS,
        "other names of the fields of examples: `messages`, `role`, `content`, `system`, `tools`, or `prompt`, "
        "`completion`, or `instruction`, `input`, `output`",
        "as {messages: dialog, role: speaker, content: text}",
    ),
    "data.roles": Key(bounds.FIELDS, "roles of messages by their names in the rows", "as {bot: assistant}"),
    "data.field": Key(bounds.FIELD, "field of the lines, or column, with the text"),
    "data.suffixes": Key(bounds.SUFFIXES, "endings of the text files taken from a folder"),
    "data.files": Key(or_null(bounds.PATTERN), "a pattern of the files' paths in a folder; null: all"),
    "data.tokenizer": Key(
        or_null(PATH), "a Hugging Face tokenizer folder, or a name on the hub; null: bytes, 256 tokens"
    ),
    "data.validation_fraction": Key(bounds.VALIDATION_FRACTION, "share of the text that is held out"),
    "data.validation_path": Key(or_null(PATH), "text to evaluate on; null: a share of `data.path`'s"),
    "data.validation_documents": Key(bounds.VALIDATION_DOCUMENTS, "documents of a stream that are evaluated on"),
    "data.shuffle_buffer": Key(
        bounds.SHUFFLE_BUFFER, "sequences of a stream that are shuffled among each other; 1: the order of the files"
    ),
    "data.cache_dir": Key(or_null(PATH), "where tokens are cached; null: $XDG_CACHE_HOME/distopt or ~/.cache/distopt"),
    "data.add_tokens": Key(bounds.TOKENS, "as `model.add_tokens`, which it follows"),
    "data.separate": Key(switch(), "keep the documents of a sequence apart, in attention, positions and loss"),
    "data.packing": Key(switch(), "several examples per sequence, none of which sees another"),
    "data.ignore": Key(bounds.IGNORE, "fields of the lines that are not read"),
    "cluster.memory_gib": Key(POSITIVE, "memory of a GPU in GiB"),
    "cluster.tflops": Key(POSITIVE, "dense TFLOP/s of a GPU in the precision of the model"),
    "cluster.efficiency": Key(bounds.EFFICIENCY, "share of them that a model reaches"),
    "cluster.memory_gbps": Key(POSITIVE, "GB/s of a GPU's memory"),
    "cluster.host_gbps": Key(POSITIVE, "GB/s of a machine's memory, for each of its GPUs"),
    "cluster.near_gbps": Key(POSITIVE, "GB/s that a GPU sends to another of its machine"),
    "cluster.far_gbps": Key(POSITIVE, "GB/s that a GPU sends to another machine"),
    "cluster.latency_us": Key(POSITIVE, "microseconds of one hop of a collective"),
}

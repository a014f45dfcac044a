"""What a Hugging Face folder holds beside the weights, as files that a checkpoint keeps for `distopt.export`."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CONFIG, GENERATION = "config.json", "generation_config.json"
# What another part of a run may have otherwise: the model computes the same, but for the noise it is trained with.
_HARMLESS = re.compile(
    "_.*|transformers_version|architectures|(torch_)?dtype|use_cache|output_.*|initializer_range"
    "|(bos|eos)_token_id|.*drop.*"
)


def description(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
) -> dict[str, bytes]:
    """The files, by name, that tell how to build a model and how to make its tokens: no paths, nothing of this machine.

    config: of the model that is trained. The files' differs from it in what is for training: `use_cache` is on, and
        generation ends with the token that ended a document in training, unless the configuration knows it already.
    tokenizer: as the text was tokenized with it.
    folder: where the model comes from, if it was pretrained; its generation_config.json is kept where it fits.
    """
    config = copy.deepcopy(config)
    config.use_cache = True
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    known = config.eos_token_id
    fits = end is None or end in (known if isinstance(known, list) else [known])
    if not fits:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, end
    with tempfile.TemporaryDirectory() as written:
        config.save_pretrained(written)
        tokenizer.save_pretrained(written, save_jinja_files=False)  # several chat templates would be a folder
        files = {file.name: file.read_bytes() for file in sorted(Path(written).iterdir())}
    if fits and folder is not None and (folder / GENERATION).is_file():
        files[GENERATION] = (folder / GENERATION).read_bytes()
    return files


def architecture(config: PretrainedConfig) -> dict[str, Any]:
    """What a configuration says of the function that the model computes, which shapes alone do not tell."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return {f"model.config.{name}": value for name, value in fields.items() if not _HARMLESS.fullmatch(name)}


def saved_architecture(checkpoint: Path) -> dict[str, Any]:
    """That of the model in a checkpoint, with the defaults of today's transformers; empty where nothing tells it."""
    from transformers import AutoConfig

    if not (checkpoint / CONFIG).is_file():
        return {}
    return architecture(AutoConfig.from_pretrained(checkpoint, local_files_only=True))

"""Model and tokenizer files of a Hugging Face folder, which checkpoints include for `distopt.export`."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distopt.checkpoint.folder import small_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CONFIG, GENERATION = "config.json", "generation_config.json"
# Fields that may change within a run, since they affect nothing but dropout in what the model computes.
_HARMLESS = re.compile(
    "_.*|transformers_version|architectures|(torch_)?dtype|use_cache|output_.*|initializer_range"
    "|(bos|eos)_token_id|.*drop.*"
)


def description(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
) -> dict[str, bytes]:
    """Return the files from which the model and its tokenizer can be rebuilt, without paths or facts of this machine.

    Args:
        config: The configuration in training. In the file `use_cache` is on, and generation ends with the token that
            ended a document in training, unless the configuration contains it already.
        tokenizer: The tokenizer of the training text.
        folder: The folder of the pretrained model, if any; its generation_config.json is included if it ends
            generation with the same token.

    Returns:
        The contents of the files, by name.
    """
    config = copy.deepcopy(config)
    config.use_cache = True
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    known = config.eos_token_id
    ends_alike = end is None or end in (known if isinstance(known, list) else [known])
    if not ends_alike:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, end
    with tempfile.TemporaryDirectory() as written:
        config.save_pretrained(written)
        tokenizer.save_pretrained(written, save_jinja_files=False)  # several chat templates would become a folder
        files = {file.name: file.read_bytes() for file in sorted(Path(written).iterdir())}
    if ends_alike and folder is not None and (folder / GENERATION).is_file():
        files[GENERATION] = (folder / GENERATION).read_bytes()
    return files


def architecture(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration that determine what the model computes, beyond the shapes of its tensors."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return {f"model.config.{name}": value for name, value in fields.items() if not _HARMLESS.fullmatch(name)}


def saved_architecture(checkpoint: Path) -> dict[str, Any]:
    """Return the `architecture` of a checkpoint's model, with the defaults of the installed transformers.

    It is empty if the checkpoint contains no configuration.
    """
    files = small_files(checkpoint)
    return architecture(configuration(files)) if CONFIG in files else {}


def configuration(files: Mapping[str, bytes]) -> PretrainedConfig:
    """Return the configuration in the files of a checkpoint, without running code that it may name.

    Raises:
        ValueError: transformers has no such model, or the file cannot be read.
    """
    from transformers import AutoConfig

    with written(files) as folder:
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # of any class, by what the file says
            reason = str(error).replace(f"{folder}", "the checkpoint").splitlines()[0]
            raise ValueError(f"{CONFIG} cannot be used ({reason}); code of a checkpoint is never run") from error
    return config


@contextlib.contextmanager
def written(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Yield a temporary folder with these files, whose names are plain."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        yield Path(folder)

"""Export of a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distopt.checkpoint import load_average, load_weights, manifest
from distopt.checkpoint.folder import newest_checkpoint, open_checkpoint, small_files
from distopt.models import pretrained
from distopt.models.language_model import LanguageModel
from distopt.models.lora import CONFIG as ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    adapter_only: bool = False,
    average: bool = False,
) -> str:
    """Write a checkpoint of `distopt.train` as a folder that transformers loads.

    Runs in one process without a process group or a GPU, whatever the engine and the number of processes of the
    training. The folder is written under a temporary name and renamed when it is complete. Memory: the model in
    `dtype`, and one tensor in its saved dtype; one more copy while writing for families whose tensors transformers
    arranges differently in memory and on disk, such as mixtures of experts.

    Args:
        checkpoint: The folder of a checkpoint, or of a run, whose newest complete checkpoint is exported.
        out: The folder to write, which must be empty or not exist.
        dtype: The dtype of the weights. float32 gives the logits of training bit for bit, except for the rounding of
            merging an adapter.
        adapter_only: Write only the adapter of a LoRA run, as `peft` does, which needs the pretrained model at its
            original path; otherwise it is merged into the weights.
        average: Write the average of the weights in place of those of the last step: that of `distopt.EMA` or
            `distopt.LAWA`, or a schedule-free optimizer's.

    Returns:
        A message that says what was written and how to load it.

    Raises:
        ValueError: The checkpoint is incomplete, cannot be read or is not of `distopt.train`, `out` is not empty, or
            weights are too large for `dtype`, or it has no average. Nothing is written.
    """
    out = Path(out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another name")
    folder = newest_checkpoint(Path(checkpoint).expanduser())
    content, files = open_checkpoint(folder), small_files(folder)
    if pretrained.CONFIG not in files:
        raise ValueError(
            f"{folder} contains no {pretrained.CONFIG}: it was not written by this version of distopt.train"
        )
    if adapter_only and ADAPTER not in files:
        raise ValueError(f"{folder} contains no adapter: export it without --adapter")
    model = read_model(folder, content, files, dtype, merge=not adapter_only, average=average)

    partial = out.with_name(f"{out.name}.exporting")  # so that a killed export leaves nothing named `out`
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        (partial / "README.md").unlink(missing_ok=True)  # peft's empty template
        for name, data in files.items():
            # The remaining files are the tokenizer and, for a pretrained model, its generation_config.json.
            if name not in (pretrained.CONFIG, ADAPTER):
                (partial / name).write_bytes(data)
        try:
            tokenizer = fitting_tokenizer(partial)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    exported = [p for p in model.parameters() if p.requires_grad or not adapter_only]
    size = f"{sum(p.numel() for p in exported) / 1e6:,.2f}M parameters in {str(dtype).removeprefix('torch.')}"
    loading = f"AutoModelForCausalLM.from_pretrained({str(out)!r}), the tokenizer by {tokenizer}"
    what = f"the average in {folder.name}" if average else folder.name
    return f"wrote {out} from {what}: {size}; load it by {loading}"


def read_model(
    folder: Path,
    content: dict[str, Any],
    files: Mapping[str, bytes],
    dtype: torch.dtype,
    merge: bool = True,
    average: bool = False,
) -> Any:
    """Load the model of a checkpoint on the CPU; buffers that are not saved remain uninitialized.

    Args:
        folder: A complete checkpoint.
        content: Its manifest.
        files: Its `small_files`.
        dtype: The dtype of the weights.
        merge: Merge an adapter into the weights; otherwise a model with an adapter is returned as a `peft.PeftModel`.
        average: Load the average of the weights.

    Returns:
        A `PreTrainedModel`, or a `peft.PeftModel`.

    Raises:
        ValueError: The checkpoint cannot be read or does not match its config.json, or weights are too large for
            `dtype`.
    """
    try:
        model: Any = LanguageModel().empty(pretrained.configuration(files))
        adapted = _adapted(model, files) if ADAPTER in files else None
        both = content["parameters"], manifest.described(model.state_dict())
        manifest.check_model(*({name: of and of[:1] for name, of in tensors.items()} for tensors in both))  # shapes
        nn.Module.to(model, torch.float32 if adapted else dtype).to_empty(device="cpu")
        model.tie_weights()
        (load_average if average else load_weights)(folder, model.state_dict())
        if adapted:  # merged in float32, so that weights are rounded once
            model = adapted.merge_and_unload(safe_merge=True) if merge else adapted
            nn.Module.to(model, dtype)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{folder} cannot be exported: {error}") from error
    if dtype == torch.float16:
        for name, tensor in model.state_dict().items():
            if tensor.isinf().any():
                raise ValueError(f"{folder}: {name} is too large for float16: choose bfloat16 or float32")
    return model


def _adapted(model: PreTrainedModel, files: Mapping[str, bytes]) -> Any:
    """Insert the adapter of a checkpoint into a model on the meta device; return the `peft.PeftModel`."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("it has a LoRA adapter, and peft is not installed: pip install 'distopt[finetune]'")
    from peft import LoraConfig, get_peft_model

    with pretrained.written({ADAPTER: files[ADAPTER]}) as folder:
        config = LoraConfig.from_pretrained(str(folder))
    model.name_or_path = config.base_model_name_or_path  # get_peft_model overwrites the latter by the former
    with warnings.catch_warnings():
        # peft 0.21.2 uses names that transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config, low_cpu_mem_usage=True)


def fitting_tokenizer(folder: Path) -> str:
    """Return the name of the transformers class that loads an exported tokenizer as it was used in training.

    This is AutoTokenizer, except for families (Qwen2, ...) for which it replaces the rules of the file by its own.

    Raises:
        ValueError: The file of the tokenizer is damaged.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return "AutoTokenizer"
    probe = "It's  A\u0301  \u0100 1234\r\n\t\u65e5\u672c\u8a9e \u00df\ufb01 \U0001f600 def f(x):\n    return x"
    try:
        expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(probe, add_special_tokens=False).ids
    except Exception as error:  # tokenizers has no class of its own for it
        raise ValueError(f"tokenizer.json cannot be read ({error}): the checkpoint is damaged, take another") from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found = tokenizer.encode(probe, add_special_tokens=False)
    return "AutoTokenizer" if found == expected else "PreTrainedTokenizerFast"

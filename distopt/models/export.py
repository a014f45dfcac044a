"""A checkpoint as a Hugging Face folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distopt.checkpoint import latest_checkpoint, load_weights, manifest
from distopt.checkpoint.folder import TRAINING, open_checkpoint
from distopt.models import pretrained
from distopt.models.language_model import LanguageModel
from distopt.models.lora import CONFIG as ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    adapter_only: bool = False,
) -> str:
    """Writes a checkpoint of `distopt.train` as a folder that transformers loads, and returns what there is to say.

    One process, whatever the engine and the number of processes that trained; no process group and no GPU. The folder
    gets its name when it is complete. Memory: the model in `dtype`, and one tensor as it was saved (for families that
    transformers keeps otherwise in memory than on disk, such as mixtures of experts, one more copy while it writes).

    checkpoint: its folder, or that of a run, of which the newest complete one is taken.
    out: a folder that is not there yet, or empty.
    dtype: of the weights; float32 gives the logits of training bit for bit, but for what merging an adapter rounds.
    adapter_only: write the adapter of a LoRA run by itself, as `peft` does, which needs the pretrained model where it
        was; else it is merged into the weights.
    Raises ValueError, with nothing written, for a checkpoint that is not complete, cannot be read or is not of
    `distopt.train`, for an `out` that is not empty, and for weights that are too large for `dtype`.
    """
    out = Path(out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another name")
    folder, content = open_checkpoint(find(Path(checkpoint).expanduser()))
    if pretrained.CONFIG not in content["files"]:
        raise ValueError(f"{folder} holds no {pretrained.CONFIG}: it was not written by this version of distopt.train")
    if adapter_only and ADAPTER not in content["files"]:
        raise ValueError(f"{folder} holds no adapter: export it without --adapter")
    model = read_model(folder, content, dtype, merge=not adapter_only)

    half = out.with_name(f"{out.name}.exporting")  # renamed whole, so that a killed export leaves nothing named `out`
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        model.save_pretrained(half)
        (half / "README.md").unlink(missing_ok=True)  # of peft, with nothing in it
        for name in content["files"]:
            # What is not the checkpoint's own is the tokenizer and, of a pretrained model, how it generates.
            if name not in (TRAINING, ".metadata", pretrained.CONFIG, ADAPTER) and not name.endswith(".distcp"):
                shutil.copyfile(folder / name, half / name)
        tokenizer = fitting_tokenizer(half)
        os.replace(half, out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    counted = [p for p in model.parameters() if p.requires_grad or not adapter_only]
    size = f"{sum(p.numel() for p in counted) / 1e6:,.2f}M parameters in {str(dtype).removeprefix('torch.')}"
    how = f"AutoModelForCausalLM.from_pretrained({str(out)!r}), the tokenizer by {tokenizer}"
    return f"wrote {out} from {folder.name}: {size}; load it by {how}"


def find(path: Path) -> Path:
    """The newest complete checkpoint, if the path is a run or its folder of checkpoints; else the path itself."""
    for folder in (path / "checkpoints", path):
        newest, broken = latest_checkpoint(folder)
        if newest is not None:
            for line in broken:
                print(f"distopt: passed over {line}", file=sys.stderr)
            return newest
        if broken or (folder != path and folder.is_dir()):
            raise ValueError(f"{folder} has no complete checkpoint: {broken[0] if broken else 'it is empty'}")
    return path


def read_model(folder: Path, content: dict[str, Any], dtype: torch.dtype, merge: bool = True) -> Any:
    """The model of a checkpoint on the CPU. Its parameters alone are good: buffers that no file holds are not set.

    merge: an adapter into the weights that it changes; else a `peft.PeftModel`.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model: Any = LanguageModel().empty(config)
        adapted = _adapted(model, folder) if ADAPTER in content["files"] else None
        both = content["parameters"], manifest.described(model.state_dict())
        manifest.check_model(*({name: of and of[:1] for name, of in tensors.items()} for tensors in both))  # shapes
        nn.Module.to(model, torch.float32 if adapted else dtype).to_empty(device="cpu")
        model.tie_weights()
        load_weights(folder, model.state_dict())
        if adapted:  # in float32, and rounded once
            model = adapted.merge_and_unload(safe_merge=True) if merge else adapted
            nn.Module.to(model, dtype)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{folder} cannot be exported: {error}") from error
    except RuntimeError as error:  # torch goes on about what else could be tried
        raise ValueError(re.split(r"\. |; |\n", str(error))[0] + ": the checkpoint is damaged, take another") from error
    if dtype == torch.float16:
        for name, tensor in model.state_dict().items():
            if tensor.isinf().any():
                raise ValueError(f"{folder}: {name} is too large for float16: choose bfloat16 or float32")
    return model


def _adapted(model: PreTrainedModel, folder: Path) -> Any:
    """A meta model with the adapter of a checkpoint put into it, as `peft` knows it."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("it has a LoRA adapter, and peft is not installed: pip install 'distopt[finetune]'")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig.from_pretrained(str(folder))
    model.name_or_path = config.base_model_name_or_path  # get_peft_model puts the one into the other's place
    with warnings.catch_warnings():
        # peft 0.21.2 asks for names of transformers that 5.23 deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config, low_cpu_mem_usage=True)


def fitting_tokenizer(folder: Path) -> str:
    """The class of transformers that reads an exported tokenizer as it was trained with.

    It is AutoTokenizer, but for some families (Qwen2, ...) that puts the family's own rules in place of the file's.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return "AutoTokenizer"
    probe = "It's  A\u0301  \u0100 1234\r\n\t\u65e5\u672c\u8a9e \u00df\ufb01 \U0001f600 def f(x):\n    return x"
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(probe, add_special_tokens=False).ids
    found = AutoTokenizer.from_pretrained(folder, local_files_only=True).encode(probe, add_special_tokens=False)
    return "AutoTokenizer" if found == expected else "PreTrainedTokenizerFast"

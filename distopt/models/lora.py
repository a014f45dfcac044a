"""LoRA adapters, by `peft`: few trainable weights next to the frozen ones of a pretrained model."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distopt.bounds import DROPOUT, TARGET_MODULES, integer
from distopt.data import hub
from distopt.models import transformers_private

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
NAME = "default"


class LoRA:
    r"""Low-rank adaptation: the weight of linear modules becomes W + alpha / r * B A, where A and B are trained.

    A (r rows) is initialized like the weight of a linear module and B with zeros, so that training starts at the
    pretrained model.

    Args:
        r: The rank of the update, >= 1.
        alpha: The scale of the update, >= 1.
        dropout: The dropout probability of the inputs of A, in [0, 1).
        target_modules: Suffixes of the names of the modules to adapt, or one regular expression that matches full
            names; "all-linear" for every linear module except the output; None for the default of `peft` for the
            model's family (attention).

    Raises:
        ValueError: An argument is out of bounds, or `peft` is not installed.

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685.
    """

    def __init__(
        self,
        r: int = 16,
        alpha: int = 32,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = "all-linear",
    ) -> None:
        integer(1).check("adapter.r", r, "16 is usual")
        integer(1).check("adapter.alpha", alpha, "twice r is usual")
        DROPOUT.check("adapter.dropout", dropout)
        if importlib.util.find_spec("peft") is None:
            raise ValueError("adapter=lora: peft is not installed: pip install 'distopt[finetune]'")
        _check_targets(target_modules)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules = target_modules if isinstance(target_modules, (str, type(None))) else list(target_modules)

    def describe(self) -> dict[str, Any]:
        """Return the arguments, which identify the adapter."""
        return dict(vars(self))

    def add(self, model: PreTrainedModel, path: Path | None) -> dict[str, bytes]:
        """Insert the adapter into a model on the meta device, and freeze all other parameters.

        Args:
            model: The model.
            path: The folder of the pretrained model.

        Returns:
            The adapter's configuration file of `peft`, as {name: content}.

        Raises:
            ValueError: There is no pretrained model, no module has one of the names, or the weight of a module is tied
                to another one's, which would change with it.
        """
        from peft import LoraConfig, inject_adapter_in_model

        if path is None:
            raise ValueError("adapter=lora adapts a pretrained model: give model.path=<a folder of save_pretrained>")
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=hub.origin(path),
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            fan_in_fan_out=_conv1d(model),
        )
        names = [name for name, _ in model.named_modules()]
        for ending in self.target_modules if isinstance(self.target_modules, list) else ():
            if not any(f".{name}".endswith(f".{ending}") for name in names):
                raise ValueError(
                    f"adapter.target_modules={self.target_modules}: {ending} is not found, no module's name ends "
                    f"with it; there are {_endings(model)}"
                )
        try:
            inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
        except ValueError as error:
            # peft prints the module with all that it contains.
            kind = re.match(r"Target module (\w+)\(.*is not supported", str(error), re.DOTALL)
            reason = f"peft does not adapt modules of the class {kind[1]}" if kind else error
            raise ValueError(f"adapter.target_modules={self.target_modules}: {reason}") from error
        for name in {
            path for pair in transformers_private.method(model, "all_tied_weights_keys").items() for path in pair
        }:
            module = name.rpartition(".")[0].removesuffix(".base_layer")
            if hasattr(model.get_submodule(module), "base_layer"):
                raise ValueError(
                    f"adapter.target_modules: the weight of {module} is tied to another module's: leave it out"
                )
        with tempfile.TemporaryDirectory() as written:
            config.save_pretrained(written)
            return {CONFIG: (Path(written) / CONFIG).read_bytes()}


def reset(module: nn.Module) -> None:
    """Initialize the adapter of a module, if it has one."""
    if hasattr(module, "reset_lora_parameters"):
        module.reset_lora_parameters(NAME, True)  # type: ignore[operator]


def pretrained_name(name: str) -> str | None:
    """Return the name of a parameter in the pretrained model; None for parameters of an adapter."""
    return None if f".{NAME}." in name else name.replace(".base_layer.", ".")


def _check_targets(targets: object) -> None:
    """Raise `ValueError` unless `targets` is a regular expression, a list of suffixes, or None."""
    TARGET_MODULES.check("adapter.target_modules", targets)
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"adapter.target_modules={targets} is not a regular expression ({error})") from error


def _endings(model: nn.Module) -> str:
    """List the last components of the names of modules with a weight, for an error message."""
    paths = [path for path, module in model.named_modules() if getattr(module, "weight", None) is not None]
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()}))


def _conv1d(model: nn.Module) -> bool:
    """Return whether linear modules store their weights transposed, as those of GPT-2 do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())

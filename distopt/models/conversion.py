"""Conversion of saved tensors to those of a model by transformers: renaming, merging, dequantization."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distopt.models import transformers_private

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming
    from transformers.quantizers import HfQuantizer


@dataclass(frozen=True)
class Conversion:
    """A conversion of tensors of the files to tensors of the model.

    Attributes:
        transform: A `WeightRenaming` or `WeightConverter` of transformers.
        target: The name of the first tensor of the model that it yields.
        sources: The pattern of the transform and the name in the files, for each tensor that it consumes.
    """

    transform: WeightRenaming | WeightConverter
    target: str
    sources: list[tuple[str, str]]

    @property
    def renames(self) -> bool:
        """Whether it changes nothing but the name."""
        converter = transformers_private.read("core_model_loading", "WeightConverter")
        dequantizes = getattr(self.transform, "quantization_operation", None) is not None
        return len(self.sources) == 1 and not isinstance(self.transform, converter) and not dequantizes

    def __call__(
        self, model: PreTrainedModel, tensors: Mapping[str, Tensor] | Mapping[str, Callable[[], Tensor]]
    ) -> dict[str, Tensor]:
        """Convert tensors of the files, or functions that read them, to tensors of the model, by name."""
        # A conversion consumes its tensors. Of transformers 5.20 add_tensor is typed for futures, but takes these too.
        transform: Any = copy.deepcopy(self.transform)
        for pattern, name in self.sources:
            transform.add_tensor(self.target, name, pattern, tensors[name])
        converted = transform.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def dequantizer(quantization: Any) -> HfQuantizer | None:
    """Return the quantizer of transformers in its dequantizing mode; None for a folder that is not quantized."""
    if quantization is None:
        return None
    from transformers.quantizers import AutoHfQuantizer

    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    refusal = (
        f"the weights are quantized (quantization_config in config.json: {method}), which transformers does not undo "
        "while it loads them here: give the folder of the full model, or load this one with transformers, "
        "model.dequantize(), and save_pretrained"
    )
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
        if "dequantize" not in getattr(quantizer, "get_load_operations", dict)():  # transformers 5.20 lacks it
            raise ValueError(refusal)
        quantizer.quantization_config.dequantize = True
        quantizer.validate_environment()
    except (ImportError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(refusal if str(error) == refusal else f"{refusal} ({error})") from error
    return quantizer

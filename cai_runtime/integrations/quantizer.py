"""What transformers calls to load and save a slim checkpoint: its quantization method "cai".

Imported while transformers imports its own quantizers, so torch and our modules are imported in methods.
"""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cai_runtime.errors import CheckpointWriteError, InvalidConfigError, TensorShapeError, UnsupportedModelError
from cai_runtime.integrations.names import Names
from cai_runtime.slim.config import QUANT_METHOD, SlimConfig
from cai_runtime.slim.spec import STORES, ModuleSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIG_FILE = "config.json"


def register() -> None:
    """Add the quantization method to transformers' registries. Idempotent."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(SlimQuantizationConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(SlimQuantizer)


class SlimQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a slim checkpoint, with the checks of the reader. Keeps all entries as they were read.

    Of an elastic checkpoint, transformers loads the largest size. It does not load the second, lowrank form of a dense
    module. A model without second forms is not elastic, so `to_dict` leaves out the table.

    Raises what `SlimConfig.from_config` raises, such as InvalidConfigError.
    """

    quant_method: Any = QUANT_METHOD

    def __init__(self, **entries: Any):
        self._entries = {"quant_method": QUANT_METHOD} | entries
        slim = SlimConfig.from_config({"quantization_config": self._entries})
        assert slim is not None
        self.modules: dict[str, ModuleSpec] = slim.modules
        table = slim.elastic.modules if slim.elastic is not None else ()
        self.second_forms: dict[str, ModuleSpec] = {m.name: m.second for m in table if m.second is not None}
        self.quant_method = QUANT_METHOD

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        left_out = {"elastic"} if self.second_forms else set()
        return copy.deepcopy({key: value for key, value in self._entries.items() if key not in left_out})

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> SlimQuantizationConfig:
        return type(self)(**copy.deepcopy(self._entries, memo))


class SlimQuantizer(HfQuantizer):
    """Replaces the modules that the checkpoint lists by modules with cores. transformers then loads the tensors by name."""

    requires_calibration = (
        True  # transformers must not compress a dense model while loading it: `cai compress` does that
    )
    quantization_config: SlimQuantizationConfig

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters: gradients pass through

    @property
    def is_compileable(self) -> bool:
        # torch.compile works, on the plain torch path. `generate` must not compile by itself: the kernels are faster.
        return False

    # transformers calls some of these hooks, by version, after it has read the config and before it looks for the weights'
    # files. The guard must be removed in between.
    def update_tp_plan(self, config: Any) -> Any:
        return _without_guard(config)

    def update_ep_plan(self, config: Any) -> Any:
        return config

    def update_attn_implementation(self, config: Any) -> Any:
        return _without_guard(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> Any:
        """Raises what `Checkpoint.open` raises, UnsupportedModelError, TensorShapeError."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedModelError("a slim checkpoint can't be loaded with tensor parallelism; use a device_map")
        stored = _checked_tensors(checkpoint_files)
        names = Names(model)
        _untie_what_differs(model, self.quantization_config.modules, stored, names)
        for name, spec in self.quantization_config.modules.items():
            if spec.kind == "dense" and STORES[spec.store[0]].scale is None:
                continue  # stays a stock module, in the requested dtype
            found = _name_in(model, name, spec, names)
            if found is not None:
                _put(model, found, spec, dtype or model.dtype)
        unused = {
            re.escape(tensor)
            for name, spec in self.quantization_config.second_forms.items()
            for tensor in spec.tensors(name)
        }
        if unused:  # so that transformers does not report them as unexpected
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *unused}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Raises TensorDtypeError, InvalidPivotError."""
        from cai_runtime.integrations.dense import slim_modules
        from cai_runtime.integrations.linear import TiedLinear

        modules = slim_modules(model)
        for name, module in modules.items():
            module.check(name)
            module.arrange()
        heads_first = sorted(modules.values(), key=lambda module: not isinstance(module, TiedLinear))
        for module in heads_first:  # a tied head also protects its embedding's weight
            module.protect()
        _guard_saves(model)
        _guard_resizing(model)
        return model

    def get_state_dict_and_metadata(
        self, model: Any, *_: Any, **__: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict]:
        """The state dict that `save_pretrained` writes: listed dense modules are cast back to their float stores."""
        import torch

        from cai_runtime.slim.shard import DTYPES

        state = model.state_dict()
        changed: dict[int, torch.Tensor] = {}
        names = Names(model)
        for name, spec in self.quantization_config.modules.items():
            weight = state.get(names.in_model(f"{name}.weight") or "")
            if weight is None or spec.kind != "dense" or not weight.is_floating_point():
                continue
            if tuple(weight.shape) != (spec.out_features, spec.in_features):
                raise CheckpointWriteError(
                    f"is {list(weight.shape)} now, but was loaded as {[spec.out_features, spec.in_features]}, and a slim "
                    "checkpoint can't follow. Save `model.dequantize()`",
                    tensor=f"{name}.weight",
                )
            stored = getattr(torch, DTYPES[STORES[spec.store[0]].dtype][0])
            if weight.dtype != stored and weight.device.type != "meta":
                changed[weight.data_ptr()] = weight.to(stored)
        if not changed:
            return None, {}
        # `changed` is by address, so that tied weights stay one tensor, which transformers saves once.
        return {name: changed.get(tensor.data_ptr(), tensor) for name, tensor in state.items()}, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from cai_runtime.integrations.dense import make_dense

        make_dense(model, dtype)
        for guarded in ("save_pretrained", "resize_token_embeddings"):
            model.__dict__.pop(guarded, None)
        return model


# ------------------------------------------------------------------------------------------------------- loading


def _checked_tensors(checkpoint_files: list[str] | None) -> set[str]:
    """Names of the checkpoint's tensors, after checking them against its config: transformers would draw a missing core at
    random. Empty if the tensors were given as a state_dict."""
    from cai_runtime.slim.reader import Checkpoint

    if not checkpoint_files:
        return set()
    directory = Path(checkpoint_files[0]).parent
    if not (directory / CONFIG_FILE).exists():  # a config from elsewhere: shapes are compared while loading
        return set()
    with Checkpoint.open(directory) as checkpoint:
        return set(checkpoint.tensors())


def _untie_what_differs(model: Any, modules: dict[str, ModuleSpec], stored: set[str], names: Names) -> None:
    """Untie two weights that config.json ties, if the checkpoint holds both and one of them is slim.

    transformers unties stock weights that differ, but it can't compare slim ones.

    Raises UnsupportedModelError if the checkpoint has the cores of a tie's target but not its source: transformers loads
    the source.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    held = {names.in_model(name) for name in stored | {f"{module}.weight" for module in modules}}
    slim = {
        names.in_model(f"{name}.weight")
        for name, spec in modules.items()
        if spec.kind != "dense" or STORES[spec.store[0]].scale is not None
    }
    for target, source in list(tied.items()):
        if target in held and source in held and slim & {target, source}:
            del tied[target]
        elif target in slim and source not in held:
            raise UnsupportedModelError(
                f"config.json ties {source} to {target}, which the checkpoint stores as cores; transformers needs those of "
                f"{source}. Use cai_runtime.Client, or `cai export --dense`"
            )


def _name_in(model: Any, name: str, spec: ModuleSpec, names: Names) -> str | None:
    """The module's name in this class of model. None if the class lacks it: a base model has no head."""
    parts = [tensor.removeprefix(".") for tensor in spec.tensors("")]
    found = names.module_in_model(name, parts)
    if found is not None:
        if found in dict(model.named_modules()):
            return found
        if not found.startswith(f"{model.base_model_prefix}.") and found.split(".")[0] not in dict(
            model.named_children()
        ):
            return None  # part of a head that this class doesn't have
    raise UnsupportedModelError(
        f"{type(model).__name__} has no module {name}, which the checkpoint stores as cores: transformers fuses or renames "
        "it in this architecture. Use cai_runtime.Client, or `cai export --dense`"
    )


def _put(model: Any, name: str, spec: ModuleSpec, dtype: torch.dtype) -> None:
    """Replace a stock module, and a head tied to it, by modules that hold the cores."""
    from torch import nn

    from cai_runtime.integrations.embedding import SlimEmbedding
    from cai_runtime.integrations.linear import FactorizedLinear, SlimLinear, TiedLinear
    from cai_runtime.integrations.stand_in import is_linear

    stock: Any = model.get_submodule(name)
    if is_linear(stock):
        _check_shape(name, spec, (stock.out_features, stock.in_features))
        kind = SlimLinear if spec.kind == "dense" else FactorizedLinear
        model.set_submodule(name, kind(spec, bias=stock.bias is not None, dtype=dtype))
        return
    if not isinstance(stock, nn.Embedding) or set(stock._parameters) != {"weight"} or spec.kind != "dense":
        raise UnsupportedModelError(
            f"{name} is a {type(stock).__name__} in {type(model).__name__}; in transformers a {spec.kind} module of "
            f"{'+'.join(spec.store)} can stand for a plain Linear (or, if dense, Embedding) alone. Use cai_runtime.Client, "
            "or `cai export --dense`"
        )
    _check_shape(name, spec, (stock.num_embeddings, stock.embedding_dim))
    subclass = stock if type(stock) is not nn.Embedding else None
    table = SlimEmbedding(spec, padding_idx=stock.padding_idx, dtype=dtype, stock=subclass)
    model.set_submodule(name, table)
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if source == f"{name}.weight" and target.endswith(".weight"):
            head = model.get_submodule(target.removesuffix(".weight"))
            if type(head) is not nn.Linear:
                raise UnsupportedModelError(f"{target} is tied to a packed embedding and belongs to no plain Linear")
            tied = TiedLinear(table, bias=head.bias is not None, dtype=dtype)
            model.set_submodule(target.removesuffix(".weight"), tied)


def _check_shape(name: str, spec: ModuleSpec, wanted: tuple[int, int]) -> None:
    found = (spec.out_features, spec.in_features)
    if found != wanted:
        raise TensorShapeError(f"the module is {list(found)}, but config.json asks for {list(wanted)}", tensor=name)


# -------------------------------------------------------------------------------------------------------- guard


def _without_guard(config: Any) -> Any:
    """Remove the guard from the config, so that transformers looks for the weights under their own name."""
    from cai_runtime.slim.writer import GUARD, GUARD_KEY

    if getattr(config, GUARD_KEY, None) == GUARD:
        delattr(config, GUARD_KEY)
    return config


def _guard_saves(model: nn.Module) -> None:
    """Let the model's `save_pretrained` add the guard to config.json: transformers removes it when it saves."""
    model.__dict__["save_pretrained"] = partial(_save_pretrained, model)  # copied and pickled with the model


def _save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained` with the guard. Raises CheckpointWriteError for `push_to_hub=True`: it would upload
    config.json without the guard."""
    if kwargs.get("push_to_hub"):
        raise CheckpointWriteError("save_pretrained can't upload a slim checkpoint; use model.push_to_hub(...)")
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    file = Path(save_directory) / CONFIG_FILE
    if kwargs.get("is_main_process", True) and not getattr(self, "_hf_peft_config_loaded", False) and file.exists():
        add_guard(file)


def _guard_resizing(model: nn.Module) -> None:
    """Let the model's `resize_token_embeddings` raise an error that names the slim module that can't be resized."""
    if isinstance(getattr(model, "resize_token_embeddings", None), MethodType):
        model.__dict__["resize_token_embeddings"] = partial(_resize_token_embeddings, model)


def _resize_token_embeddings(
    self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """`PreTrainedModel.resize_token_embeddings`. Raises UnsupportedModelError if the number of rows would change, but
    embedding or head is a slim module."""
    from cai_runtime.integrations.dense import slim_modules

    rows = self.get_input_embeddings().weight.shape[0]
    changes = pad_to_multiple_of is not None or new_num_tokens not in (None, rows)
    ends = {id(end) for end in (self.get_input_embeddings(), self.get_output_embeddings())}
    found = [name for name, module in slim_modules(self).items() if id(module) in ends]
    if changes and found:
        raise UnsupportedModelError(
            f"{' and '.join(found)} can't be resized: the checkpoint stores it as a slim module of {rows} rows. Resize "
            "`model.dequantize()`, or the original model before compressing it"
        )
    return type(self).resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def add_guard(file: Path) -> None:
    """Add the guard to the config.json of a slim checkpoint, in one step. Raises InvalidConfigError for another config."""
    from cai_runtime.slim.writer import GUARD, GUARD_KEY

    config = json.loads(file.read_text(encoding="utf-8"))
    if (config.get("quantization_config") or {}).get("quant_method") != QUANT_METHOD:
        raise InvalidConfigError("the saved config has no slim quantization_config", file=file)
    config[GUARD_KEY] = GUARD
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    new.replace(file)


register()  # `registration` leaves it to this module if its import is what imports transformers

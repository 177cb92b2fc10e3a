"""The options of an engine: their defaults, and one check of all of them before anything is loaded. Light to import."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from cai_runtime.byte_sizes import parse_bytes
from cai_runtime.errors import MemoryBudgetError, OptionTypeError, OptionValueError
from cai_runtime.scalars import as_bool, as_integer, as_number, shown
from cai_runtime.slim.elastic import checked_keep

# Every name of a dtype that is taken, and torch's.
DTYPES = {
    "fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16",
    "float16": "float16",
}  # fmt: skip
KV_DTYPES = {**DTYPES, "int8": "int8"}
# The default of `prefill_chunk`. On a GPU the factors of a linear make half as many tiles as its matrix would, which do not
# fill the device below some thousand rows.
PREFILL_CHUNK, PREFILL_CHUNK_GPU = 512, 4096
ACTIVATIONS = ("auto", "fp32", "int8")
BACKENDS = ("reference", "cpu", "triton", "cuda")  # as `kernels.backend` has them, which brings torch
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is opened. `checked` gives one whose values are of the right types and in range.

    Attributes:
        device: "cpu", "cuda", "cuda:1", or "auto": a GPU if torch sees one.
        dtype: what float weights are held in: "fp32", "bf16", "fp16" or "auto". "auto" keeps them as stored on the CPU,
            whose kernels convert in registers and compute in fp32; on a GPU it takes the checkpoint's own dtype.
        keep: of an elastic checkpoint, the share of its dense parameters to open, at most, in (0, 1]. None: the largest.
        kv_cache: the KV cache's budget: bytes, a text such as "2GiB", or a fraction of the free memory as a float in
            (0, 1]. None: see `engine.memory.cache_budget`.
        kv_dtype: of the cached keys and values: as `dtype`, or "int8": codes with a scale for each token and head, a
            quarter of fp32's bytes and half of bf16's for a loss that docs/results.md gives. "auto": the activations'. With
            "auto" and "int8" those of an encoder's output are held as the checkpoint's float weights are, unless `dtype`
            says otherwise.
        max_context: positions that a sequence may have, at most the model's. None: the model's.
        max_batch: sequences that run at once, at least 1.
        prefill_chunk: prompt tokens fed in one step at most, at least 1. None: 512, on a GPU 4096.
        prefill_time: seconds that a step may take which feeds a prompt while other sequences decode: the longest that
            one long prompt holds up the others' next token. Infinity: no bound. None: `Engine`'s default.
        prefix_cache: whether prompts reuse the KV of equal beginnings.
        max_waiting: requests that may wait before further ones are refused, at least 0. None: any number.
        backend: kernels to use: "reference", "cpu", "triton" or "cuda". None: the device's.
        activations: what the inputs of int8 weights are rounded to before they are multiplied: "fp32" (as they are), or
            "int8" (W8A8): on a CPU with a scale for each 16 columns, on a GPU for each row and without the output embedding,
            which is faster there for some accuracy. "auto": int8 on a CPU with VNNI, where it is faster from one row on
            and costs less than 0.3 % of perplexity (docs/results.md); elsewhere in encoders alone.
        cuda_graphs: record decode steps as CUDA graphs. None: where there is a GPU.
        progress: show a bar while weights load. None: on a terminal only.
    """

    device: str = "auto"
    dtype: str = "auto"
    keep: float | None = None
    kv_cache: int | float | str | None = None
    kv_dtype: str = "auto"
    max_context: int | None = None
    max_batch: int = 64
    prefill_chunk: int | None = None
    prefill_time: float | None = None
    prefix_cache: bool = True
    max_waiting: int | None = None
    backend: str | None = None
    activations: str = "auto"
    cuda_graphs: bool | None = None
    progress: bool | None = None

    @classmethod
    def of(cls, options: EngineOptions | Mapping[str, Any] | None = None, /, **more: Any) -> Self:
        """Checked options from options, or from a mapping and keywords, in which None means "not given".

        Raises:
            OptionTypeError, OptionValueError, KeepError: as `checked`; OptionTypeError for an unknown name.
        """
        if isinstance(options, EngineOptions):
            given = {**vars(options), **more}
        else:
            given = {**(options or {}), **more}
        names = {field.name for field in fields(cls)}
        if unknown := [name for name in given if name not in names]:
            raise OptionTypeError(f"unknown option {shown(unknown[0])}: there are {', '.join(sorted(names))}")
        return cls(**{name: value for name, value in given.items() if value is not None}).checked()

    def checked(self) -> Self:
        """These options with every value checked; torch's and NumPy's objects become plain ones, None the default.

        Raises:
            OptionTypeError (a TypeError): a value is of a wrong type; the message names the option.
            OptionValueError (a ValueError): a value is out of range; the message names what is allowed.
            KeepError (a ValueError): `keep` is not in (0, 1].
        """
        unset: dict[str, Any] = {
            field.name: field.default for field in fields(self) if getattr(self, field.name) is None
        }
        self = replace(self, **unset)
        return replace(
            self,
            device=_device(self.device),
            dtype=_dtype("dtype", self.dtype, DTYPES, '"fp32", "bf16" or "fp16"'),
            keep=_keep(self.keep),
            kv_cache=_kv_cache(self.kv_cache),
            kv_dtype=_dtype("kv_dtype", self.kv_dtype, KV_DTYPES, '"fp32", "bf16", "fp16" or "int8"'),
            max_context=_whole("max_context", self.max_context, least=1),
            max_batch=_whole("max_batch", self.max_batch, least=1),
            prefill_chunk=_whole("prefill_chunk", self.prefill_chunk, least=1),
            prefill_time=_seconds("prefill_time", self.prefill_time),
            prefix_cache=_flag("prefix_cache", self.prefix_cache),
            max_waiting=_whole("max_waiting", self.max_waiting, least=0),
            backend=_choice("backend", self.backend, BACKENDS),
            activations=_choice("activations", self.activations, ACTIVATIONS) or "auto",
            cuda_graphs=_flag("cuda_graphs", self.cuda_graphs),
            progress=_flag("progress", self.progress),
        )

    def given(self) -> dict[str, Any]:
        """Keyword arguments that give these options: device and dtype, and what differs from the defaults."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default or field.name in ("device", "dtype")
        }

    def for_engine(self) -> dict[str, Any]:
        """The keyword arguments of `Engine` among them; without those that are left to its defaults."""
        names = ("max_batch", "prefill_chunk", "prefill_time", "prefix_cache", "max_waiting")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if given.get("prefill_time") == math.inf:
            given["prefill_time"] = None  # which is no bound there
        return given


def _keep(value: Any) -> float | None:
    if value is None:
        return None
    number = as_number(value)
    return checked_keep(value if number is None else number)


def _device(value: Any) -> str:
    name = _name_of_torch("device", value)
    if _DEVICE.fullmatch(name) is None:
        raise OptionValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {shown(value)}')
    return name


def _dtype(option: str, value: Any, names: Mapping[str, str], words: str) -> str:
    name = _name_of_torch(option, value)
    if name != "auto" and name not in names:
        raise OptionValueError(f'{option} must be "auto", {words}, got {shown(value)}')
    return name


def _name_of_torch(option: str, value: Any) -> str:
    """A text, or what torch calls its own object: `torch.bfloat16` is "bfloat16"."""
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    if not isinstance(value, str):
        raise OptionTypeError(f"{option} must be a string, got {shown(value)}")
    return value


def _choice(option: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise OptionTypeError(f"{option} must be a string, got {shown(value)}")
    if value not in allowed:
        raise OptionValueError(f"{option} must be one of {', '.join(allowed)}, got {shown(value)}")
    return value


def _whole(option: str, value: Any, *, least: int) -> Any:
    if value is None:
        return None
    number = as_integer(value)
    if number is None:
        raise OptionTypeError(f"{option} must be an integer of at least {least}, got {shown(value)}")
    if not least <= number < 2**31:
        raise OptionValueError(f"{option} must be an integer from {least} to {2**31 - 1}, got {shown(value)}")
    return number


def _seconds(option: str, value: Any) -> float | None:
    if value is None:
        return None
    number = math.inf if value == math.inf else as_number(value)
    if number is None and not isinstance(value, float):  # a float here is NaN or minus infinity
        raise OptionTypeError(f"{option} must be a number of seconds above 0, got {shown(value)}")
    if number is None or number <= 0:
        raise OptionValueError(f"{option} must be a number of seconds above 0, got {shown(value)}")
    return float(number)


def _flag(option: str, value: Any) -> Any:
    if value is None:
        return None
    flag = as_bool(value)
    if flag is None:
        raise OptionTypeError(f"{option} must be True or False, got {shown(value)}")
    return flag


def _kv_cache(value: Any) -> int | float | str | None:
    if value is None:
        return None
    allowed = (
        'kv_cache must be a number of bytes, a text such as "2GiB", or a float in (0, 1] for a share of free memory'
    )
    if isinstance(value, str):
        try:
            parse_bytes(value)
        except (MemoryBudgetError, OverflowError):
            raise OptionValueError(f"{allowed}, got {shown(value)}") from None
        return value
    number = as_number(value)
    if number is None and not isinstance(value, float):  # a float here is NaN or infinite
        raise OptionTypeError(f"{allowed}, got {shown(value)}")
    if number is None or number <= 0 or (isinstance(number, float) and number > 1) or number >= 2**63:
        raise OptionValueError(f"{allowed}, got {shown(value)}")
    return number

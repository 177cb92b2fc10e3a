"""Other engines, measured the same way: llama.cpp through xllamacpp, and transformers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from cai_runtime.bench.decode import ITEM_BYTES, DecodeSettings, check_length
from cai_runtime.errors import BenchmarkError


class LlamaCpp:
    """llama.cpp's server, in-process through xllamacpp: a slot per prompt, continuous batching, KV cache in fp16.

    One thread per request waits for the reply; these threads sleep inside the server.
    """

    engine = "llama.cpp"
    kv_item_bytes = 2

    def __init__(self, path: Path, settings: DecodeSettings):
        import xllamacpp

        from cai_runtime.bench.machine import version_of

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = settings.batch
        # The slots share the context equally. 32 more each, because the server reserves a few positions.
        params.n_ctx = settings.batch * (settings.prompt_tokens + settings.tokens + 32)
        params.cpuparams.n_threads = settings.threads
        params.cpuparams_batch.n_threads = settings.threads
        params.n_gpu_layers = 0
        params.fit_params = False  # would change n_ctx
        params.cache_ram_mib = 0  # no prompt cache beside the slots
        params.verbosity = 0
        self.weight_bytes, self.weights = gguf_weights(path)
        self.versions = {"xllamacpp": str(version_of("xllamacpp")), "llama.cpp": str(xllamacpp.BUILD_INFO)}
        self._server: Any = xllamacpp.Server(params)

    def generate(self, prompts: list[list[int]], tokens: int) -> list[float]:
        done = [0.0] * len(prompts)
        replies: list[Any] = [None] * len(prompts)
        start = 0.0

        def ask(index: int) -> None:
            request = {"prompt": prompts[index], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            try:
                replies[index] = self._server.handle_completions({**request, "cache_prompt": False})
            except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
                replies[index] = {"error": error}
            done[index] = time.perf_counter() - start

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for reply in replies:
            if "error" in reply:
                raise BenchmarkError(f"llama.cpp refused a request: {reply['error']}")
            check_length(self.engine, reply["usage"]["completion_tokens"], tokens)
        return done

    def close(self) -> None:
        self._server = None


def gguf_weights(path: Path) -> tuple[int, str]:
    """(bytes of the tensors that a decode step reads, the type of most of these bytes, such as "Q4_1")."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    counts: dict[str, int] = {}
    for tensor in tensors:
        if not (untied and tensor.name == "token_embd.weight"):
            counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return sum(counts.values()), max(counts, key=lambda name: counts[name])


class Transformers:
    """transformers' `generate` on one padded batch with its default attention, in `dtype` "float32" or "bfloat16"."""

    engine = "transformers"

    def __init__(self, path: Path, settings: DecodeSettings):
        import torch
        from transformers import AutoModelForCausalLM

        from cai_runtime.bench.machine import version_of

        torch.set_num_threads(settings.threads)
        auto: Any = AutoModelForCausalLM  # its annotations are wrong
        self._model = auto.from_pretrained(
            str(path), dtype=getattr(torch, settings.dtype), trust_remote_code=False, local_files_only=True
        )
        self._model.to(settings.device).eval()
        weights = {id(p): p.nbytes for p in self._model.parameters()}  # a tied weight counts once
        embedding, head = self._model.get_input_embeddings().weight, self._model.get_output_embeddings().weight
        self.weight_bytes = sum(weights.values()) - (0 if head is embedding else embedding.nbytes)
        self.weights = settings.dtype
        self.kv_item_bytes = ITEM_BYTES[settings.dtype]
        self.versions = {name: str(version_of(name)) for name in ("transformers", "torch")}

    def generate(self, prompts: list[list[int]], tokens: int) -> list[float]:
        import torch

        start = time.perf_counter()
        ids = torch.tensor(prompts, device=self._model.device)
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            ).cpu()
        done = time.perf_counter() - start
        check_length(self.engine, out.shape[1] - ids.shape[1], tokens)
        return [done] * len(prompts)

    def close(self) -> None:
        del self._model

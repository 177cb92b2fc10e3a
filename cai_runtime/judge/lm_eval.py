"""EleutherAI's lm-evaluation-harness on our engine: the model "cai" (extra: lm-eval).

    python -m cai_runtime.judge.lm_eval --model cai --model_args pretrained=DIR --tasks lambada_openai

is the harness's own command line with that model registered. In Python, import this module before
`lm_eval.simple_evaluate`. The runner's logits give log likelihoods, several short texts in one pass. Generation submits
all of a task's prompts to the engine, which batches them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.errors import InvalidRequestError
from cai_runtime.judge.judges import EngineJudge

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)

DEFAULT_BATCH = 16
DEFAULT_MAX_TOKENS = 256  # the harness's default for tasks that set no limit
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


@register_model("cai")
class CaiLM(TemplateLM):
    """A slim or dense checkpoint on our engine.

    Args:
        pretrained: a checkpoint directory.
        batch_size: sequences decoded together; default and "auto": 16.
        max_batch_size: takes precedence over batch_size.
        max_length: tokens of context, from 2 to the model's (the default).
        device, dtype, kv_cache, activations, backend: as for `Client`; `backend` names the kernels.

    Raises InvalidRequestError for another max_length, and as `open_judge`.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        **options: Any,
    ):
        super().__init__()
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            # The harness passes cuda:0 when its user named no device.
            logger.warning("device %s: torch sees no GPU here, so the model runs on the CPU", device)
            device = "cpu"
        batch = DEFAULT_BATCH if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        self.path = str(pretrained)
        self.judge = EngineJudge(
            pretrained, device=device or "auto", dtype=dtype, max_batch=max_batch_size or batch, **options
        )
        self.tokenizer = self.judge.tokenizer
        context = self.judge.max_context
        if max_length is not None and not 2 <= int(max_length) <= context:
            raise InvalidRequestError(f"max_length {max_length} is not in 2 .. {context}, the model's context")
        self.max_length = context if max_length is None else int(max_length)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before an empty context: beginning of sequence, else end of text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_gen_toks(self) -> int:
        return DEFAULT_MAX_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. add_special_tokens None: True unless the text begins with the beginning-of-sequence token."""
        bos = self.tokenizer.bos_token
        special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            # A text that is too long loses its beginning. Its last token is predicted but not fed.
            ids = (context + continuation)[-self.max_length - 1 :]
            texts.append((ids, max(len(ids) - len(continuation), 1)))
        # Sorted by length, so that passes are full. The longest text comes first: a lack of memory then shows at once.
        order = sorted(range(len(texts)), key=lambda k: -len(texts[k][0]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        with tqdm(total=len(texts), desc="loglikelihood", disable=disable_tqdm or None) as bar:
            scored = self.judge.log_likelihoods([texts[k] for k in order], bar.update)
        for k, value in zip(order, scored, strict=True):
            found[k] = value
            if requests[k][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[k][0], value)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log likelihoods of whole documents, in windows of `max_length` tokens that overlap by one token."""
        documents = [request.args[0] for request in requests]
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for k, document in enumerate(documents):
            for context, predicted in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(document, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append((None, context, predicted))
                owners.append(k)
        totals = [0.0] * len(documents)
        for k, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[k] += value
        for document, total in zip(documents, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (document,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Submit all prompts; the engine batches them. A prompt that leaves no room for the answer loses its beginning."""
        handles = []
        for request in requests:
            context, arguments = request.args
            sampling = sampling_of(arguments)
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise InvalidRequestError(
                    f"max_gen_toks {sampling.max_tokens} leaves no room for a prompt in {self.max_length} tokens"
                )
            handles.append(self.judge.engine.submit(Request(self.tok_encode(context)[-room:], sampling)))
        texts = []
        for request, handle in zip(
            requests, tqdm(handles, desc="generate_until", disable=disable_tqdm or None), strict=True
        ):
            texts.append(handle.result().text)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def close(self) -> None:
        """Free the model's memory."""
        self.judge.close()


def sampling_of(arguments: dict[str, Any]) -> SamplingParams:
    """A task's `generation_kwargs` as `SamplingParams`. Greedy, unless `do_sample` or, without it, a temperature is set.

    Raises InvalidRequestError for an argument that the engine does not have.
    """
    known = dict(arguments)
    until = known.pop("until", None) or []
    lengths = [int(value) for name in _LENGTHS if (value := known.pop(name, None)) is not None]
    do_sample = known.pop("do_sample", None)
    chosen = {name: value for name in _SAMPLING if (value := known.pop(name, None)) is not None}
    if unknown := sorted(name for name, value in known.items() if value is not None):
        raise InvalidRequestError(f"generation_kwargs {', '.join(unknown)}: the engine has no such parameter")
    if do_sample is None:
        do_sample = float(chosen.get("temperature", 0.0)) > 0
    if not do_sample:
        chosen = {"temperature": 0.0} | ({"repetition_penalty": p} if (p := chosen.get("repetition_penalty")) else {})
    stops = (until,) if isinstance(until, str) else tuple(until)
    return SamplingParams(
        max_tokens=lengths[0] if lengths else DEFAULT_MAX_TOKENS, stop=tuple(s for s in stops if s), **chosen
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

"""The tokens that end a turn, from metadata and from what chat templates write after an answer."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cai_runtime.engine.turn_ends import end_of_sequence_ids
from cai_runtime.errors import InvalidConfigError

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<start_of_turn>", "<end_of_turn>",
    "<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|assistant|>", "</s>",
]  # fmt: skip
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "{% for m in messages %}{{ m.role + '\n\n' + m.content | trim }}"
    "{% if builtin_tools is defined and m.tool_calls %}<|eom_id|>{% else %}<|eot_id|>{% endif %}{% endfor %}"
)
GEMMA = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }} <end_of_turn>\n{% endfor %}"
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}{% if loop.last and m.role == 'assistant' %}"
    "<|return|>{% elif m.tool_calls %}<|call|>{% else %}<|end|>{% endif %}{% endfor %}"
)
ZEPHYR = "{% for m in messages %}{{ m.role }}\n{{ m.content + eos_token }}\n{% endfor %}"


def tokenizer_of(template, special=True, eos="<|endoftext|>"):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(token, special=special, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (CHATML, ["<|im_end|>"]),
        (LLAMA3, ["<|eot_id|>", "<|eom_id|>"]),
        (GEMMA, ["<end_of_turn>"]),
        (HARMONY, ["<|return|>", "<|call|>"]),
        (ZEPHYR, []),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", []),
        ("{% for m in messages %}<|assistant|>{{ m.content }}{% endfor %}", []),
        ("{{ raise_exception('never') }}", []),
        ("{% for m in", []),
        ({"default": CHATML, "tool_use": LLAMA3}, ["<|im_end|>", "<|eom_id|>"]),
        ({"one": CHATML, "other": LLAMA3}, ["<|eom_id|>"]),
        (None, []),
    ],
    ids=str,
)
def test_what_the_template_writes_after_an_answer_ends_it(tmp_path, template, written):
    tokenizer = tokenizer_of(template)
    ends = end_of_sequence_ids(tmp_path, {}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ends) == sorted(
        ["<|endoftext|>", *written], key=tokenizer.convert_tokens_to_ids
    )


def test_an_end_of_turn_need_not_be_special(tmp_path):
    tokenizer = tokenizer_of(CHATML, special=False)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in end_of_sequence_ids(tmp_path, {}, tokenizer)


def test_metadata(tmp_path):
    tokenizer = tokenizer_of(None)
    eos = tokenizer.eos_token_id
    assert end_of_sequence_ids(tmp_path, {"eos_token_id": [5, True]}, tokenizer) == (5, eos)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert end_of_sequence_ids(tmp_path, {"eos_token_id": 5}, tokenizer) == (7, 8, eos)
    tokenizer.eot_token_id = 9
    assert end_of_sequence_ids(tmp_path, {"eos_token_id": 5}, tokenizer) == (7, 8, 9, eos)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(InvalidConfigError, match="generation_config"):
        end_of_sequence_ids(tmp_path, {}, tokenizer)

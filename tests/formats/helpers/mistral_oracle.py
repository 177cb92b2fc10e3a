"""Run beside mistral-common, which is no dependency: writes Mistral's tokenizer as transformers reads it, the chat
templates that mistral-common makes, and the token ids that its encoder gives.

    python mistral_oracle.py DIRECTORY < requests.json

A request is {"messages": [...], "tools": [...]}, as OpenAI's API has it. Written: tokenizer.json, a template for each
version such as v11.jinja, and ids.json: by version, for each request its token ids, or null where the encoder refuses it.
"""

import json
import sys
from pathlib import Path

import mistral_common
from mistral_common.exceptions import MistralCommonException
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokens, TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers.integrations.mistral import convert_tekken_tokenizer

VOCABULARY = "tekken_240911.json"
VERSIONS = ("v3", "v7", "v11", "v13")
ADDED = (SpecialTokens.args, SpecialTokens.call_id, SpecialTokens.begin_think, SpecialTokens.end_think)


def main(directory, requests):
    stored = json.loads((Path(mistral_common.__file__).parent / "data" / VOCABULARY).read_text())
    stored.pop("multimodal", None)
    # Those of the last version for all of them, so that one tokenizer serves; the earlier ones don't write the others.
    special = [dict(token) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    special += [{"rank": len(special) + i, "token_str": text, "is_control": True} for i, text in enumerate(ADDED)]
    file, ids = directory / "tekken.json", {}
    for version in VERSIONS:
        config = {**stored["config"], "version": version}
        file.write_text(json.dumps({**stored, "special_tokens": special, "config": config}))
        template = template_of(version)
        (directory / f"{version}.jinja").write_text(template)
        encoder = MistralTokenizer.from_file(file)
        ids[version] = [ids_of(encoder, request) for request in requests]
    convert_tekken_tokenizer(str(file), template).save_pretrained(directory)
    (directory / "chat_template.jinja").unlink()
    (directory / "ids.json").write_text(json.dumps(ids))
    file.unlink()


def template_of(version):
    return generate_chat_template(
        spm=False,
        tokenizer_version=TokenizerVersion(version),
        image_support=False,
        audio_support=False,
        thinking_support=version == "v13",
        default_system_prompt=None,
        plain_thinking_support=False,
        use_special_token_variables=True,
        model_settings_fields=None,
        reasoning_effort_values=None,
        reasoning_effort_default=None,
    )


def ids_of(encoder, request):
    try:
        return encoder.encode_chat_completion(ChatCompletionRequest.from_openai(**request)).tokens
    except MistralCommonException:
        return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.load(sys.stdin))

"""From a checked conversation to what the engine needs: the prompt of its model's format, and the mask of its grammar. Chat
and Responses share it."""

from __future__ import annotations

import json
from dataclasses import replace

from cai_runtime.api.errors import as_api_errors
from cai_runtime.api.host import ResolvedModel
from cai_runtime.api.open_model import OpenModel
from cai_runtime.engine.masks import MaskFactory
from cai_runtime.errors import ConversationError
from cai_runtime.formats.budget import budgeted
from cai_runtime.formats.conversation import Conversation, Prepared
from cai_runtime.scalars import shown


def characters(conversation: Conversation) -> int:
    """Of all that its prompt must hold, for `OpenModel.check_characters`."""
    tools = () if conversation.tool_choice == "none" else conversation.tools
    declared = sum(len(json.dumps(tool.parameters)) + len(tool.description or "") for tool in tools)
    return declared + sum(message.characters for message in conversation.messages)


def rendered(conversation: Conversation, model: ResolvedModel, opened: OpenModel) -> Prepared:
    """What the model's format makes of a conversation. Of a model whose name asks for reasoning, the conversation does so
    unless it says something else.

    Raises:
        BadRequestError: the format refuses it.
    """
    reasoning = conversation.reasoning
    by_default = model.reasons and reasoning.enabled is None and reasoning.effort is None
    if by_default:
        conversation = replace(conversation, reasoning=replace(reasoning, enabled=True))
    with as_api_errors(), opened.tokenizer_lock:
        try:
            return opened.format.prepare(conversation)
        except ConversationError as error:
            if not (by_default and error.param == "reasoning_enabled"):
                raise
            message = f"The model {shown(model.name)} asks for reasoning by default, which it can't do: {error}"
            raise ConversationError(message, param="model", code=error.code) from error


def mask_of(prepared: Prepared, opened: OpenModel, grammar_param: str) -> MaskFactory | None:
    """The mask of its grammar and of the thought's budget. A grammar takes up to seconds: not with the tokenizer's lock.

    Args:
        grammar_param: the parameter that the grammar comes from, for errors.

    Raises:
        BadRequestError: the grammar takes too much to compile.
    """
    with as_api_errors():
        mask = None if prepared.grammar is None else opened.grammars.mask(prepared.grammar, grammar_param)
    return budgeted(prepared.budget, mask)

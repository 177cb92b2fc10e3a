"""The API's exceptions: the openai package's own, and what each of the library's own becomes."""

import copy
import json
import pickle

import openai
import pytest

import cai_runtime
from cai_runtime import errors as library
from cai_runtime.api import errors

STATUS = {
    "BadRequestError": 400,
    "AuthenticationError": 401,
    "NotFoundError": 404,
    "UnprocessableEntityError": 422,
    "RateLimitError": 429,
    "InternalServerError": 500,
    "APITimeoutError": 408,
}


@pytest.mark.parametrize("name", STATUS)
def test_exceptions_are_openais(name):
    kind = getattr(cai_runtime, name)
    error = kind("what is wrong", param="n", code="too_much")
    assert error.status_code == STATUS[name] and str(error) == error.message == "what is wrong"
    assert error.body == {"error": {"message": "what is wrong", "type": error.type, "param": "n", "code": "too_much"}}
    assert isinstance(error, cai_runtime.APIError) and isinstance(error, cai_runtime.CaiError)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind and again.body == error.body and str(again) == str(error)


@pytest.mark.parametrize("name", [*STATUS, "APIError", "APIStatusError", "APIConnectionError"])
def test_handlers_written_for_openai_catch_ours(name):
    with pytest.raises(getattr(openai, name)) as caught:
        raise getattr(cai_runtime, name)("what is wrong", param="n")
    assert isinstance(caught.value, openai.OpenAIError)
    assert isinstance(caught.value, openai.APIStatusError) == isinstance(caught.value, cai_runtime.APIStatusError)


@pytest.mark.parametrize("name", STATUS)
def test_request_and_response_are_what_a_server_would_have_sent(name):
    error = getattr(cai_runtime, name)("what is wrong", param="n", code="too_much")
    assert error.response.status_code == error.status_code and error.response.json() == error.body
    assert error.request.method == "POST" and error.response.request is error.request
    assert error.request_id is None
    pickle.loads(pickle.dumps(error))  # still possible once they are made


def test_messages_can_be_printed_and_sent():
    error = cai_runtime.BadRequestError("no \ud800 here", param="a\udfff")
    assert str(error).encode("utf-8") and json.dumps(error.body, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize(
    ("error", "kind", "param", "code"),
    [
        (library.ConversationError("x", param="messages[0]"), "BadRequestError", "messages[0]", "invalid_value"),
        (library.ConversationError("x", capability="image"), "BadRequestError", "messages", "image_not_supported"),
        (library.RequestTooLargeError("x"), "BadRequestError", None, "context_length_exceeded"),
        (library.InvalidRequestError("x"), "BadRequestError", None, "invalid_value"),
        (library.QueueFullError("x"), "RateLimitError", None, "queue_full"),
        (library.SourceError("x"), "NotFoundError", "model", "model_not_found"),
        (library.TruncatedFileError("x"), "UnprocessableEntityError", "model", "invalid_checkpoint"),
        (library.UnsupportedModelError("x"), "UnprocessableEntityError", "model", "unsupported_model"),
        (library.MemoryBudgetError("x"), "InternalServerError", None, "insufficient_memory"),
        (library.EngineClosedError("x"), "InternalServerError", None, "engine_closed"),
        (library.RequestAbortedError("x"), "InternalServerError", None, "request_aborted"),
        (library.RunnerError("x"), "InternalServerError", None, None),
        (library.KernelError("x"), "InternalServerError", None, None),
        (ZeroDivisionError("x"), "InternalServerError", None, None),
        (ZeroDivisionError(), "InternalServerError", None, None),
    ],
)
def test_mapping(error, kind, param, code):
    with pytest.raises(cai_runtime.APIError) as caught, errors.as_api_errors():
        raise error
    assert type(caught.value).__name__ == kind
    assert (caught.value.param, caught.value.code, caught.value.__cause__) == (param, code, error)
    assert caught.value.message


def test_api_errors_and_interrupts_pass_through():
    for error in (errors.NotFoundError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, errors.as_api_errors():
            raise error
        assert caught.value is error

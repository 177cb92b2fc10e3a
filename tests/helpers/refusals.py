"""Requests that the API refuses."""

import pytest

from cai_runtime import BadRequestError


def refused(call, param, code=None, match=None):
    """The BadRequestError that a call raises for a parameter. code, match: of the error and its message."""
    with pytest.raises(BadRequestError, match=match) as caught:
        call()
    assert caught.value.param == param and (code is None or caught.value.code == code), caught.value
    return caught.value

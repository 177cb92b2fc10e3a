"""The endpoints /audio/transcriptions and /audio/translations: check a request, open its audio, and build the reply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cai_runtime.api.errors import BadRequestError, as_api_errors, invalid
from cai_runtime.api.host import ResolvedModel
from cai_runtime.api.open_model import OpenModel
from cai_runtime.api.transcriptions.languages import language_of
from cai_runtime.api.transcriptions.opening import begin_work
from cai_runtime.api.transcriptions.params import SpeechRequest, Task, parse_speech
from cai_runtime.api.transcriptions.running import SpeechGeneration
from cai_runtime.scalars import shown


class SpeechEndpoint:
    """What `api.serving` needs of an endpoint, for one task."""

    def __init__(self, task: Task):
        self._task = task

    def parse(self, params: Mapping[str, Any], /) -> SpeechRequest:
        """Check a call before anything is opened.

        Raises:
            BadRequestError: naming the parameter at fault.
        """
        return parse_speech(self._task, params)

    def prepare(self, request: SpeechRequest, model: ResolvedModel, opened: OpenModel, /) -> SpeechGeneration:
        """Open the audio and read its first window.

        Raises:
            BadRequestError: the model knows no such language, or can't translate, or the file can't be read.
        """
        if not request.begun:  # else its engine has ended, and the model was opened again
            with as_api_errors():
                known = opened.speech_tokens.languages
            if self._task == "translate" and not known:
                raise BadRequestError(
                    f"The model {shown(model.name)} can't translate: it knows English alone, and lacks the capability "
                    "'supports_translation'. Use a multilingual one.",
                    param="model",
                    code="translation_not_supported",
                )
            if unknown := [code for code in request.options.languages if code not in (known or ("en",))]:
                raise invalid(
                    "languages", f"has a language that the model {shown(model.name)} does not know: {unknown[0]}"
                )
            options = replace(request.options, language=language_of(request.language, model.name, known))
            with as_api_errors():
                request.begun.append(begin_work(request.file, options, opened))
        return SpeechGeneration(request.begun[0])


TRANSCRIPTIONS = SpeechEndpoint("transcribe")
TRANSLATIONS = SpeechEndpoint("translate")

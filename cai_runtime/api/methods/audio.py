"""`client.audio` and its twin for asyncio."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, overload

from typing_extensions import Unpack

from cai_runtime.api.generation import AsyncStream, Stream
from cai_runtime.api.methods.endpoint import Methods
from cai_runtime.api.models import require_speech
from cai_runtime.api.serving import acreate, create
from cai_runtime.api.transcriptions import TRANSCRIPTIONS, TRANSLATIONS
from cai_runtime.api.transcriptions.params import SpeechParams
from cai_runtime.api.transcriptions.reply import SpeechEvent, SpeechTranscription, SpeechTranslation


class Transcriptions(Methods):
    """`client.audio.transcriptions`."""

    @overload
    def create(self, *, stream: Literal[True], **params: Unpack[SpeechParams]) -> Stream[SpeechEvent]: ...
    @overload
    def create(
        self, *, stream: Literal[False] | None = None, **params: Unpack[SpeechParams]
    ) -> SpeechTranscription: ...
    @overload
    def create(
        self, *, stream: bool | None, **params: Unpack[SpeechParams]
    ) -> SpeechTranscription | Stream[SpeechEvent]: ...
    def create(self, **params: Any) -> Any:
        """Transcribe audio. The parameters are those of SpeechParams and `stream`.

        Returns:
            SpeechTranscription, the `openai` package's TranscriptionVerbose with some fields more; with `stream=True` a
            Stream of that package's transcript events, as segments are done.

        Raises:
            APIError: see `cai_runtime.api.errors`; while streaming, the stream may raise it too. BadRequestError names
                `file` where that can't be read, and the capability that a model lacks. APITimeoutError after `timeout`
                seconds: of a whole reply from the call to its end, of a stream to each next event.
        """
        return create(TRANSCRIPTIONS, self._host, params, self._timeout, require=require_speech)


class Translations(Methods):
    """`client.audio.translations`."""

    @overload
    def create(self, *, stream: Literal[True], **params: Unpack[SpeechParams]) -> Stream[SpeechEvent]: ...
    @overload
    def create(self, *, stream: Literal[False] | None = None, **params: Unpack[SpeechParams]) -> SpeechTranslation: ...
    @overload
    def create(
        self, *, stream: bool | None, **params: Unpack[SpeechParams]
    ) -> SpeechTranslation | Stream[SpeechEvent]: ...
    def create(self, **params: Any) -> Any:
        """Translate speech to English. Parameters and errors are those of `transcriptions.create`; models that know
        English alone are refused.

        Returns:
            SpeechTranslation, the `openai` package's TranslationVerbose with some fields more; with `stream=True` as
            there.
        """
        return create(TRANSLATIONS, self._host, params, self._timeout, require=require_speech)


class Audio(Methods):
    """`client.audio`."""

    @cached_property
    def transcriptions(self) -> Transcriptions:
        return Transcriptions(self._host, self._timeout)

    @cached_property
    def translations(self) -> Translations:
        return Translations(self._host, self._timeout)


class AsyncTranscriptions(Methods):
    """`client.audio.transcriptions` of an AsyncClient."""

    @overload
    async def create(self, *, stream: Literal[True], **params: Unpack[SpeechParams]) -> AsyncStream[SpeechEvent]: ...
    @overload
    async def create(
        self, *, stream: Literal[False] | None = None, **params: Unpack[SpeechParams]
    ) -> SpeechTranscription: ...
    @overload
    async def create(
        self, *, stream: bool | None, **params: Unpack[SpeechParams]
    ) -> SpeechTranscription | AsyncStream[SpeechEvent]: ...
    async def create(self, **params: Any) -> Any:
        """As `Client.audio.transcriptions.create`, not blocking the event loop: audio is decoded in threads. With
        `stream=True` an AsyncStream."""
        return await acreate(TRANSCRIPTIONS, self._host, params, self._timeout, require=require_speech)


class AsyncTranslations(Methods):
    """`client.audio.translations` of an AsyncClient."""

    @overload
    async def create(self, *, stream: Literal[True], **params: Unpack[SpeechParams]) -> AsyncStream[SpeechEvent]: ...
    @overload
    async def create(
        self, *, stream: Literal[False] | None = None, **params: Unpack[SpeechParams]
    ) -> SpeechTranslation: ...
    @overload
    async def create(
        self, *, stream: bool | None, **params: Unpack[SpeechParams]
    ) -> SpeechTranslation | AsyncStream[SpeechEvent]: ...
    async def create(self, **params: Any) -> Any:
        """As `Client.audio.translations.create`, not blocking the event loop; with `stream=True` an AsyncStream."""
        return await acreate(TRANSLATIONS, self._host, params, self._timeout, require=require_speech)


class AsyncAudio(Methods):
    """`client.audio` of an AsyncClient."""

    @cached_property
    def transcriptions(self) -> AsyncTranscriptions:
        return AsyncTranscriptions(self._host, self._timeout)

    @cached_property
    def translations(self) -> AsyncTranslations:
        return AsyncTranslations(self._host, self._timeout)

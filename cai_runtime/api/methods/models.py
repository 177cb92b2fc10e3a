"""`client.models` and its twin for asyncio."""

from __future__ import annotations

import asyncio

from openai.pagination import AsyncPage, SyncPage
from openai.types import Model
from typing_extensions import Unpack

from cai_runtime.api.methods.endpoint import Methods
from cai_runtime.api.models import list_models, retrieve_model
from cai_runtime.api.params import CallOptions, call_options


class Models(Methods):
    """`client.models`."""

    def list(self, **options: Unpack[CallOptions]) -> SyncPage[Model]:
        """The catalogue and the client's own models: `.data`, or iterate."""
        call_options(options)
        return SyncPage[Model](data=list_models(self._host), object="list")

    def retrieve(self, model: str, **options: Unpack[CallOptions]) -> Model:
        """One of them. Raises NotFoundError if there is none of this name."""
        call_options(options)
        return retrieve_model(self._host, model)

    def unload(self, model: str) -> bool:
        """Close a model and give back its memory; running requests fail, and the next use opens it again. False if it
        was not open. Raises NotFoundError if there is none of this name."""
        return self._host.unload(model)


class AsyncModels(Methods):
    """`client.models` of an AsyncClient."""

    async def list(self, **options: Unpack[CallOptions]) -> AsyncPage[Model]:
        """The catalogue and the client's own models: `.data`, or `async for`."""
        call_options(options)
        return AsyncPage[Model](data=await asyncio.to_thread(list_models, self._host), object="list")

    async def retrieve(self, model: str, **options: Unpack[CallOptions]) -> Model:
        """One of them. Raises NotFoundError if there is none of this name."""
        call_options(options)
        return await asyncio.to_thread(retrieve_model, self._host, model)

    async def unload(self, model: str) -> bool:
        """As `Client.models.unload`."""
        return await asyncio.to_thread(self._host.unload, model)

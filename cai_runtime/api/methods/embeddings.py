"""`client.embeddings` and its twin for asyncio."""

from __future__ import annotations

from typing_extensions import Unpack

from cai_runtime.api import embeddings as endpoint
from cai_runtime.api.embeddings import EmbeddingParams, EmbeddingReply
from cai_runtime.api.methods.endpoint import Methods
from cai_runtime.api.serving import acreate, create


class Embeddings(Methods):
    """`client.embeddings`."""

    def create(self, **params: Unpack[EmbeddingParams]) -> EmbeddingReply:
        """The embeddings of texts. The parameters are those of EmbeddingParams.

        Returns:
            CreateEmbeddingResponse, one entry for each input, in their order.

        Raises:
            APIError: see `cai_runtime.api.errors`. BadRequestError where the model's files name no pooling.
                APITimeoutError after `timeout` seconds; the request is then aborted.
        """
        reply: EmbeddingReply = create(endpoint, self._host, params, self._timeout)
        return reply


class AsyncEmbeddings(Methods):
    """`client.embeddings` of an AsyncClient."""

    async def create(self, **params: Unpack[EmbeddingParams]) -> EmbeddingReply:
        """As `Client.embeddings.create`, not blocking the event loop."""
        reply: EmbeddingReply = await acreate(endpoint, self._host, params, self._timeout)
        return reply

"""Connections that may not be slow or endless: uvicorn's protocol with limits of time and size."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError
from .settings import Limits

_MOST_HEADER_BYTES = 1 << 15
#: Requests of a connection that were sent before the one before them was answered; uvicorn keeps any number of them.
_MOST_PIPELINED = 8


def protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """A class of connections that keep to the limits."""

    class Connection(HttpToolsProtocol):
        """Closed when a header comes too slowly or is too large, requests pile up, or nobody reads what is sent."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._header: asyncio.TimerHandle | None = None
            self._stalled: asyncio.TimerHandle | None = None
            self._header_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_header()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect_header()

        def on_headers_complete(self) -> None:
            self._cancel("_header")
            if len(self.pipeline) < _MOST_PIPELINED:
                super().on_headers_complete()
            else:
                self.transport.abort()

        def data_received(self, data: bytes) -> None:
            expected = self._header
            super().data_received(data)
            # Of a header that begins in the midst of the data nothing is counted yet.
            same = self._header is not None and self._header is expected
            self._header_bytes = self._header_bytes + len(data) if same else 0
            answered = self.cycle is None or self.cycle.response_complete
            if self._header is None and answered and not self.pipeline:
                # The rest of a body that nobody reads, or the beginning of a header: uvicorn's timer has ended.
                self._header = self.loop.call_later(limits.receive, self.transport.close)
            if self._header_bytes > _MOST_HEADER_BYTES:
                message = f"a header has at most {_MOST_HEADER_BYTES} bytes"
                self._refuse(b"431 Request Header Fields Too Large", ApiError(431, message, "header_too_large"))

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(limits.receive, self.transport.abort)

        def resume_writing(self) -> None:
            self._cancel("_stalled")
            super().resume_writing()

        def connection_lost(self, error: Exception | None) -> None:
            self._cancel("_header")
            self._cancel("_stalled")
            super().connection_lost(error)

        def _expect_header(self) -> None:
            if self._header is None:
                self._header = self.loop.call_later(limits.receive, self._too_slow)

        def _too_slow(self) -> None:
            message = f"the header did not arrive within {limits.receive:g} s"
            self._refuse(b"408 Request Timeout", ApiError(408, message, "request_timeout"))

        def _refuse(self, status: bytes, error: ApiError) -> None:
            self._cancel("_header")
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete:  # else another answer is on its way
                body = json.dumps(error.body()).encode()
                head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
                self.transport.write(b"HTTP/1.1 " + status + b"\r\n" + head + body)
            self.transport.close()

        def _cancel(self, name: str) -> None:
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)

    return Connection

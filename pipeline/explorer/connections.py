"""Connections that time out: whoever opens one has to ask in time, and to take the answer.

uvicorn waits forever for the rest of a request that has begun, so connections that are opened and left hold a
server's file descriptors until nobody else can reach it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 10.0
"""A whole request has to be there this many seconds after its connection, or the last answer."""

STALLED_S = 60.0
"""An answer of which no byte is taken for this many seconds is given up."""

MOST_OPEN = 256
"""Connections at a time; a browser opens six."""


class TimedConnection(H11Protocol):
    """A connection that is closed when its request does not come, or its answer is not taken."""

    _timer: asyncio.TimerHandle | None = None
    _unsent = 0

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._wait(REQUEST_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Stop waiting once the request is whole."""
        super().data_received(data)
        if self._is_answering():
            self._unsent = 0
            self._wait(STALLED_S, self._give_up_if_stalled)

    def on_response_complete(self) -> None:
        """Wait for the next request, which may be there already."""
        self._wait(REQUEST_S, self.transport.abort)
        super().on_response_complete()
        if self._is_answering():
            self._wait(STALLED_S, self._give_up_if_stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _give_up_if_stalled(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == self._unsent:
            self.transport.abort()
            return
        self._unsent = unsent
        self._wait(STALLED_S, self._give_up_if_stalled)

    def _wait(self, seconds: float, then: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, then)

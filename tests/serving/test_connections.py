"""Connections whose other side does not read, or is slow, with a transport that is played."""

import asyncio
from unittest import mock

import uvicorn
from uvicorn.server import ServerState

from cmfast.serving.connections import protocol
from cmfast.serving.settings import Limits


def connection(seconds, work=0.0):
    async def app(scope, receive, send):
        await asyncio.sleep(work)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    config = uvicorn.Config(app, http=protocol(Limits(receive=seconds)), lifespan="off")
    config.load()
    transport = mock.MagicMock(is_closing=lambda: False)
    found = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
    transport.abort.side_effect = lambda: found.connection_lost(None)
    found.connection_made(transport)
    return found, transport


def within(work):
    asyncio.run(asyncio.wait_for(work(), 30))


def test_who_does_not_read_is_cut_off():
    async def work():
        reads, at_work = connection(0.05)
        stalls, cut = connection(0.05)
        for each in (reads, stalls):
            each.data_received(b"GET / HTTP/1.1\r\n\r\n")
            each.pause_writing()
        reads.resume_writing()
        await asyncio.sleep(0.2)
        cut.abort.assert_called_once_with()
        at_work.abort.assert_not_called()
        at_work.abort()

    within(work)


def test_who_is_slow_is_told_unless_an_answer_is_on_its_way():
    async def work():
        slow, told = connection(0.05)
        slow.data_received(b"GET / HTTP/1.1\r\n")
        quick, kept = connection(0.05)
        quick.data_received(b"GET / HTTP/1.1\r\n\r\n")
        asks, silent = connection(0.05, work=10)
        asks.data_received(b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n")
        await asyncio.sleep(0.2)
        assert told.write.call_args.args[0].startswith(b"HTTP/1.1 408 ")
        told.close.assert_called_once_with()
        kept.close.assert_not_called()
        silent.write.assert_not_called()
        silent.close.assert_called_once_with()

    within(work)


def test_a_header_is_counted_by_itself():
    """Many small ones in one piece of data are not a large one; one in many pieces is."""

    async def work():
        many, kept = connection(10)
        many.data_received(3 * (b"GET / HTTP/1.1\r\nx: " + b"y" * 20000 + b"\r\n\r\n") + b"GET / HTTP/1.1\r\n")
        kept.close.assert_not_called()
        large, told = connection(10)
        large.data_received(b"GET / HTTP/1.1\r\n")
        for _ in range(40):
            large.data_received(b"x: " + b"y" * 1000 + b"\r\n")
        assert told.write.call_args.args[0].startswith(b"HTTP/1.1 431 ")

    within(work)


def test_no_connection_stays_without_a_timer():
    """What is sent after an answer is the rest of a body that nobody read, or the beginning of another request."""

    async def work():
        for sent in (b"\r\n", b"x", b"\r\nGET"):
            after, transport = connection(0.05)
            after.data_received(
                b"GET / HTTP/1.1\r\nContent-Length: 9\r\n\r\n" if sent == b"x" else b"GET / HTTP/1.1\r\n\r\n"
            )
            await asyncio.sleep(0.02)
            transport.close.assert_not_called()
            after.data_received(sent)
            await asyncio.sleep(0.2)
            transport.close.assert_called_once_with()

    within(work)

"""A longer way to a server on this machine: a TCP relay that delivers every byte half a round trip later.

    with delay(server.port, round_trip=0.1) as port: ...

Bytes keep their order and their distances, so a stream is late but not slower.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HOST = "127.0.0.1"
CHUNK = 2**16


@contextmanager
def delay(port: int, round_trip: float) -> Iterator[int]:
    """The port of a relay to `port`; round_trip in seconds. Without a round trip there is no relay."""
    if round_trip == 0:
        yield port
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    relay = Relay(port, round_trip / 2)
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(relay.connect, HOST, 0), loop).result()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(relay.stop(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Relay:
    def __init__(self, port: int, seconds: float):
        self.port, self.seconds = port, seconds
        self.tasks: set[asyncio.Task] = set()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(HOST, self.port)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.ensure_future(self.carry(source, sink))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """One direction. What arrives is written when its time has come; the end of the stream as well."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await source.read(CHUNK):
                loop.call_later(self.seconds, self.write, sink, data)
        loop.call_later(self.seconds, sink.close)

    @staticmethod
    def write(sink: asyncio.StreamWriter, data: bytes) -> None:
        if not sink.is_closing():
            sink.write(data)

    async def stop(self, server: asyncio.Server) -> None:
        server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

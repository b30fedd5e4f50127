"""Makes an idle engine run a hook, from vLLM's API process, when the control server asks for it.

An engine without work blocks on its input queue and sees no command. A request that is aborted before
it is scheduled ends that wait and passes through the connector's hooks, without a forward pass.
vLLM has a public call for such requests: what tells a connector that a prefilled request was refused.

Without a control server the waker is a socket that tries to connect every few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from typing import Any, Final

import msgspec
import zmq
import zmq.asyncio

from kvtier.identity.request_params import PARAMS_KEY
from kvtier.link_messages import (
    ALL_RANKS,
    LINK_VERSION,
    SOCKET_NAME,
    WakerHello,
    encoder,
    waker_decoder,
)
from kvtier.server.files import default_run_dir, prepare_run_dir

logger = logging.getLogger(__name__)

HELLO_INTERVAL_S: Final = 3.0
"""A control server that has started anew learns of this waker after so long at the latest."""
WAKE_INTERVAL_S: Final = 0.01
"""Least time between two wakes: those that come within it become one."""
REQUEST_PREFIX: Final = "kvtier-wake-"
WAKE_PARAMS: Final = {PARAMS_KEY: {"wake": True}}
"""`kv_transfer_params` of the request that wakes an engine."""


class Waker:
    """One API process's end of the link to the host's control server.

    Args:
        engine_client: vLLM's `EngineClient`.
        endpoint: Of the control server's link socket.
        hello_interval_s: See `HELLO_INTERVAL_S`.
    """

    def __init__(
        self, engine_client: Any, endpoint: str, *, hello_interval_s: float = HELLO_INTERVAL_S
    ) -> None:
        self._engine_client = engine_client
        self._endpoint = endpoint
        self._hello_interval_s = hello_interval_s
        self._task: asyncio.Task[None] | None = None
        self._complaints: set[str] = set()

    @classmethod
    def of_this_host(cls, engine_client: Any) -> Waker:
        """Return the waker of the control server in the default run directory.

        Raises:
            RunDirError: that directory is not safe to use.
        """
        run_dir = prepare_run_dir(default_run_dir())
        return cls(engine_client, f"ipc://{run_dir / SOCKET_NAME}")

    def start(self) -> None:
        """Begin to listen, on the running loop; a second call does nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="kvtier-waker")

    async def stop(self) -> None:
        """End; a second call does nothing."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            # One hello waits for a server that is not there yet, and reaches it as it comes.
            socket.setsockopt(zmq.SNDHWM, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, 200)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            socket.connect(self._endpoint)
            await self._listen(socket)
        except Exception:
            logger.exception("kvtier's waker has ended: commands wait for an engine's next request")
        finally:
            socket.close()
            context.term()

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        loop = asyncio.get_running_loop()
        next_hello_s = loop.time()
        while True:
            wait_s = next_hello_s - loop.time()
            if wait_s <= 0:
                next_hello_s = loop.time() + self._hello_interval_s
                await self._say_hello(socket)
            elif await socket.poll(max(1, round(wait_s * 1000))):
                for index in await self._wanted(socket):
                    await self._wake(index)
                await asyncio.sleep(WAKE_INTERVAL_S)

    async def _say_hello(self, socket: zmq.asyncio.Socket) -> None:
        hello = WakerHello(link=LINK_VERSION, pid=os.getpid(), parent_pid=os.getppid())
        # Again: the last one still waits.
        with contextlib.suppress(zmq.Again):
            await socket.send(encoder.encode(hello), zmq.NOBLOCK)

    async def _wanted(self, socket: zmq.asyncio.Socket) -> set[int | None]:
        """Take all messages that have come, and return whom to wake."""
        indices: set[int | None] = set()
        while True:
            try:
                wake = waker_decoder.decode(await socket.recv(zmq.NOBLOCK))
                indices |= self._indices_of(wake.dp_rank)
            except zmq.Again:
                return indices
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self._complain("a message of the control server is ignored", error)
            except LookupError as error:
                self._complain("an engine could not be woken", error)

    async def _wake(self, index: int | None) -> None:
        try:
            await self._engine_client.notify_kv_transfer_request_rejected(
                # vLLM's scheduler trusts ids to be unique, over all API processes.
                f"{REQUEST_PREFIX}{uuid.uuid4().hex}",
                WAKE_PARAMS,
                data_parallel_rank=index,
            )
        except Exception as error:  # noqa: BLE001 - the API server must not notice
            self._complain("an engine could not be woken", error)

    def _indices_of(self, dp_rank: int) -> set[int | None]:
        """Return engines as vLLM counts: among those that this process sends requests to."""
        core = getattr(self._engine_client, "engine_core", None)
        managed = list(getattr(core, "engine_ranks_managed", ()))
        if len(managed) <= 1:
            return {None}
        if dp_rank == ALL_RANKS:
            return set(range(len(managed)))
        if dp_rank not in managed:
            raise LookupError(f"rank {dp_rank} is not among {managed}")
        return {managed.index(dp_rank)}

    def _complain(self, what: str, error: Exception) -> None:
        """Log an error, the first time that one of its kind comes."""
        kind = f"{what}: {type(error).__name__}"
        if kind not in self._complaints:
            self._complaints.add(kind)
            logger.warning("kvtier: %s: %s (said once)", what, error)

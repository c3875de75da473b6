"""Eventfds: counting, waiting, and being part of a poll loop or an asyncio loop."""

from __future__ import annotations

import asyncio
import gc
import resource
import select
import threading
import time

import pytest

import vfio
from tests.descriptors import open_fds


def test_it_counts_and_is_drained() -> None:
    with vfio.EventFd() as event:
        assert event.drain() == 0
        event.signal()
        event.signal(3)
        assert event.drain() == 4
        assert event.drain() == 0


def test_waiting_ends_with_the_signal_or_the_time() -> None:
    with vfio.EventFd() as event:
        began = time.monotonic()
        assert event.wait(0.05) == 0
        assert time.monotonic() - began >= 0.05
        assert event.wait(0) == 0
        threading.Timer(0.02, event.signal).start()
        assert event.wait(10) == 1


def test_epoll_sees_it() -> None:
    with vfio.EventFd() as event, select.epoll() as poller:
        poller.register(event, select.EPOLLIN)
        assert poller.poll(0) == []
        event.signal()
        assert poller.poll(1) == [(event.fileno(), select.EPOLLIN)]


def test_asyncio_waits_for_it() -> None:
    async def main() -> tuple[int, int]:
        with vfio.EventFd() as event:
            loop = asyncio.get_running_loop()
            loop.call_later(0.01, event.signal, 5)
            first = await asyncio.wait_for(event.wait_async(), 10)
            event.signal()
            return first, await event.wait_async()

    assert asyncio.run(main()) == (5, 1)


def test_asyncio_can_give_up() -> None:
    async def main() -> int:
        with vfio.EventFd() as event:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(event.wait_async(), 0.01)
            event.signal()
            return await event.wait_async()

    assert asyncio.run(main()) == 1


def test_closed_and_forgotten_ones_are_gone() -> None:
    before = open_fds()
    event = vfio.EventFd()
    event.close()
    event.close()
    with pytest.raises(ValueError, match="closed"):
        event.fileno()
    vfio.EventFd()
    gc.collect()
    assert open_fds() == before


def test_two_tasks_do_not_wait_for_one() -> None:
    async def both() -> None:
        with vfio.EventFd() as event:
            first = asyncio.ensure_future(event.wait_async())
            await asyncio.sleep(0)
            with pytest.raises(vfio.VfioError, match="another task waits"):
                await event.wait_async()
            event.signal(2)
            assert await asyncio.wait_for(first, 5) == 2

    asyncio.run(both())


def test_closing_ends_the_wait_and_frees_the_number() -> None:
    async def closing() -> None:
        event = vfio.EventFd()
        number = event.fileno()
        waiting = asyncio.ensure_future(event.wait_async())
        await asyncio.sleep(0)
        event.close()
        with vfio.EventFd() as other:
            assert other.fileno() == number
            with pytest.raises(ValueError, match="closed"):
                await asyncio.wait_for(waiting, 5)
            other.signal()
            assert await asyncio.wait_for(other.wait_async(), 5) == 1

    asyncio.run(closing())


def test_a_signal_that_somebody_else_took_is_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with vfio.EventFd(1) as event:
        real = event.drain
        taken: list[int] = []

        def late() -> int:
            if not taken:
                taken.append(real())
                event.signal(7)
                return 0
            return real()

        monkeypatch.setattr(event, "drain", late)
        assert event.wait() == 7


def test_no_more_files_is_explained() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(vfio.VfioError, match=r"cannot make an eventfd: EMFILE .*ulimit -n"):
            vfio.EventFd()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

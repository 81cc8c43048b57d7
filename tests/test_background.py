"""Background work in a process that was forked."""

from __future__ import annotations

import os
import threading

import pytest

from cacheclip_rag.background import Background


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_process_has_background_work_of_its_own(busy: bool) -> None:
    done: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def work(task: int) -> None:
        begun.set()
        if busy and task == 1:
            assert go_on.wait(60)
        done.append(task)

    background: Background[int] = Background(work)
    background.add([1, 2])
    assert begun.wait(60)
    if not busy:
        background.flush()
    if busy:
        background._changed.acquire()  # as another thread of the parent may at that moment
    child = os.fork()
    if child == 0:
        background.flush()
        background.add([3])
        background.flush()
        background.close()
        os._exit(0 if done == ([3] if busy else [1, 2, 3]) else 1)
    if busy:
        background._changed.release()
    go_on.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    background.flush()
    assert done == [1, 2]
    background.close()

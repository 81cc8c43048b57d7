"""A first-come, first-served lock on the model."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType, TracebackType

from ..errors import ConfigurationError
from ..interrupts import Gate, raised_by_signal

_LOOK = 0.1
"""Seconds between two looks of a waiting thread at whether it has been passed over or the holder is gone."""


class _Turn:
    """One place in the line, and the frame whose ``with`` block it is for."""

    __slots__ = ("frame", "gate", "thread")

    def __init__(self, frame: FrameType) -> None:
        self.frame, self.thread = frame, threading.get_ident()
        self.gate = Gate()

    def __repr__(self) -> str:
        return f"<turn of thread {self.thread}>"


class FairLock:
    """Hands the model to one forward at a time, in the order of asking.

    It is taken for a prefill or for one decoding step and never across a ``yield``, so that streams interleave and a
    call made while another one streams does not wait for it.

    An exception that a signal handler raises, KeyboardInterrupt among them, may come between any two instructions here,
    and so between a block's end and its release. So there is no count that could be left wrong, only the line itself:
    who is first in it has the lock, entering and leaving are one operation of a dictionary each, and those who wait
    take out a turn whose ``with`` block is no longer being executed.
    """

    def __init__(self) -> None:
        self._line: dict[_Turn, None] = {}
        self.refusal: str | None = None
        """Why nobody may have the lock any more; whoever asks is told so."""

    def __enter__(self) -> None:
        frame = sys._getframe(1)
        self._drop(frame)
        turn = _Turn(frame)
        try:
            self._line[turn] = None
            self._wait(turn, None)
            if self.refusal is not None:
                raise ConfigurationError(self.refusal)
        except BaseException:
            self._leave(turn)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop(sys._getframe(1))

    @property
    def idle(self) -> bool:
        return self._first() is None

    @property
    def waiting(self) -> int:
        """How many wait for who has it."""
        return max(0, len(self._line) - 1)

    # ---- forks ----------------------------------------------------------------------------------------------------

    def hold(self, frame: FrameType, patience: float) -> object | None:
        """Take it outside of a ``with`` block: until `let_go` is called with what this returns, or ``frame`` has ended.

        None where the calling thread has it already. Raises TimeoutError once it has waited for so many seconds.
        """
        mine = [turn for turn in list(self._line) if turn.thread == threading.get_ident()]
        if mine and self._first() in mine:
            return None
        turn = _Turn(frame)
        try:
            self._line[turn] = None
            self._wait(turn, time.monotonic() + (0 if mine else patience))
        except BaseException:
            self._leave(turn)
            raise
        return turn

    def let_go(self, turn: object | None) -> None:
        if isinstance(turn, _Turn):
            self._leave(turn)

    def after_fork(self) -> None:
        """In a forked process: of those who stood in the line, none has come along."""
        self._line = {}

    # ---- the line -------------------------------------------------------------------------------------------------

    def _wait(self, turn: _Turn, until: float | None) -> None:
        while next(iter(list(self._line))) is not turn and self._first() is not turn:
            turn.gate.wait(_LOOK)
            if until is not None and time.monotonic() > until:
                raise TimeoutError

    def _first(self) -> _Turn | None:
        """Who has the lock. Turns at the beginning of the line whose block has ended are taken out."""
        while line := list(self._line):
            if _executing(line[0].frame):
                return line[0]
            self._leave(line[0])
        return None

    def _leave(self, turn: _Turn) -> None:
        self._line.pop(turn, None)
        for following in list(self._line)[:1]:
            following.gate.open()

    def _drop(self, frame: FrameType) -> None:
        """Take out this frame's turn: the one it has, or one that an interrupt has left behind."""
        for turn in list(self._line):
            if turn.frame is frame:
                self._leave(turn)


def _executing(frame: FrameType) -> bool:
    """Whether a function is still being executed, by whichever thread."""
    try:
        frame.clear()  # refuses for such frames; what has ended does not need its variables
    except RuntimeError as error:
        if raised_by_signal(error):
            raise
        return True
    return False

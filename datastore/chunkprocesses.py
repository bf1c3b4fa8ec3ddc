"""Chunks compressed, written and counted in processes of their own, which see the rows where they lie.

Threads of one process share one interpreter lock, and the thread that keeps a GPU busy asks for it after every
operation of the model: beside sixteen threads that write, launching the model's work took half as long again. Here a
thread of the caller only waits for a process, and the rows are in memory that both map.

One process is started, and once it has imported what is needed it forks the others: the caller itself must not be
forked, for it holds threads and a GPU. `prepare` starts it beforehand, for importing takes one or two seconds. All
end by themselves when the caller does, at the latest after the chunk that they are at: the same bits as whoever goes on
would write, under a name that is given only to what is whole.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from datastore.arena import Arena, mapped, memory_file
from datastore.chunkwork import ChunkWork
from datastore.combine import Counted, StatsPiece
from datastore.dtype import numpy_dtype
from datastore.errors import DatastoreError
from datastore.partials import ChunkId, Partials
from datastore.schema import Plan
from datastore.stats import compile_sums

__all__ = ["ChunkProcesses", "prepare"]

_LOOK = 5.0
"""Seconds after which who is asked nothing looks whether who started it is still there."""
_NICER = 5
"""Below the caller, which must get its turn at once, and as much of the processors as it leaves."""
_MOST_DESCRIPTORS = 200
"""In one message; the system allows 253."""
_KILLED = 128
"""Added to the signal that ended a process to tell of it in an exit code."""


class ChunkProcesses:
    """Does what `ChunkWork` does in processes; the arrays it is given must lie in the arena.

    Parameters
    ----------
    group : Path
        The capture's group, before it is published.
    plan : Plan
    partials : Path
        The directory of partial statistics.
    n : int
        How many; as many threads may ask at once.
    arena : Arena
    compiled : bool
        Count by the compiled loop, where there is one.
    """

    def __init__(self, group: Path, plan: Plan, partials: Path, *, n: int, arena: Arena, compiled: bool) -> None:
        self._arena = arena
        pairs = [socket.socketpair() for _ in range(n)]
        self._all = [Connection(ours.detach()) for ours, _ in pairs]
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for connection in self._all:
            self._idle.put(connection)
        told = memory_file("datastore-plan", pickle.dumps((group, plan, partials, compiled)))
        self._first = _First.take()
        try:
            self._first.begin(told, arena.descriptor, *(theirs.fileno() for _, theirs in pairs))
        finally:
            os.close(told)
            for _, theirs in pairs:
                theirs.close()

    def write(self, chunk: ChunkId, values: NDArray[Any], rows: int) -> int:
        """As `Work.write`."""
        return int(self._ask("write", chunk, self._arena.offset(values), rows))

    def combine(self, piece: StatsPiece) -> Counted:
        """As `Work.combine`."""
        counted: Counted = self._ask("combine", piece)
        return counted

    def drain(self) -> None:
        """As `Work.drain`."""
        taken = [self._idle.get() for _ in self._all]  # whoever combines ends before
        try:
            for connection in taken:
                self._answer(connection, "drain")
        finally:
            for connection in taken:
                self._idle.put(connection)

    def close(self) -> None:
        """As `Work.close`."""
        for connection in self._all:
            connection.close()
        self._first.wait()
        self._arena.close()

    def _ask(self, *asked: Any) -> Any:
        connection = self._idle.get()
        try:
            return self._answer(connection, *asked)
        finally:
            self._idle.put(connection)

    def _answer(self, connection: Connection, *asked: Any) -> Any:
        try:
            connection.send(asked)
            good, answer = connection.recv()
        except (EOFError, OSError) as error:
            raise DatastoreError(
                f"a process that compresses and writes chunks {_how_it_ended(self._first.wait())}; what is finished is "
                "kept, run the same command again to go on"
            ) from error
        if good:
            return answer
        raise answer


def prepare(*, compiled: bool) -> None:
    """Start importing, and compiling, for the next `ChunkProcesses` while something else takes time."""
    _First.spare = _First.spare or _First(compiled=compiled)


class _First:
    """The process that imports, and forks the others once it is told of a plan; it ends when this process does.

    Attributes
    ----------
    spare : _First or None
        One that is prepared and knows of no plan.
    """

    spare: "_First | None" = None

    def __init__(self, *, compiled: bool = False) -> None:
        self._socket, theirs = socket.socketpair()
        given = str(os.getpid()), str(theirs.fileno()), str(int(compiled))
        with theirs:
            self._process = subprocess.Popen(
                # -P: the working directory is on its path only if it is on ours, or a file there could hide a module
                [sys.executable, "-P", "-m", "datastore.chunkprocesses", *given],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # else whoever reads the caller's output would wait for these processes too
                process_group=0,  # a Ctrl-C at the terminal is the caller's
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
                | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            )

    @classmethod
    def take(cls) -> "_First":
        """Return the one that is prepared, if it lives, or a new one."""
        spare, cls.spare = cls.spare, None
        if spare is not None and spare._process.poll() is not None:
            spare._socket.close()
            spare = None
        return spare or cls()

    def begin(self, *descriptors: int) -> None:
        """Have it fork: the plan's descriptor, the memory's, and a socket for each process."""
        with self._socket, suppress(BrokenPipeError):  # whoever asks the processes is told how it ended
            for at in range(0, len(descriptors), _MOST_DESCRIPTORS):
                socket.send_fds(self._socket, [b"."], descriptors[at : at + _MOST_DESCRIPTORS])

    def wait(self) -> int:
        """Return its exit code."""
        return self._process.wait()


def _how_it_ended(code: int) -> str:
    number = -code if code < 0 else code - _KILLED
    if number <= 0:
        return f"ended with exit code {code}"
    return f"was ended by {signal.Signals(number).name}, as the system does with SIGKILL when memory runs out"


# -- in the processes ------------------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Import and read what all need, fork a process for each socket, and wait for them."""
    caller, control, compiled_soon = (int(given) for given in sys.argv[1:])
    with suppress(OSError):
        os.nice(_NICER)
    if compiled_soon:
        compile_sums()
    descriptors = _descriptors(control)
    if not descriptors:
        os._exit(0)  # nobody needed it
    told, arena, *sockets = descriptors
    with open(told, "rb") as file:
        group, plan, partials, compiled = pickle.load(file)
    work, memory = ChunkWork(group, plan, Partials(partials, plan), compiled=compiled), mapped(arena)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    children, here = set(), os.getpid()
    while sockets:
        one = sockets.pop(0)
        child = os.fork()
        if child == 0:
            for other in sockets:  # else the caller would not see that their process has died
                os.close(other)
            _serve(Connection(one), work, plan, memory=memory, parent=here)
        os.close(one)
        children.add(child)
    _wait_for(children, caller)


def _descriptors(control: int) -> list[int]:
    """Receive descriptors until the other end is closed."""
    found: list[int] = []
    with socket.socket(fileno=control) as asked:
        while True:
            message, some, _, _ = socket.recv_fds(asked, 1, _MOST_DESCRIPTORS)
            if not message:
                return found
            found += some


def _wait_for(children: set[int], caller: int) -> NoReturn:
    """Wait for all children, and end as the first that does not end well; the others end with it."""
    code = 0
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
            ended = os.waitstatus_to_exitcode(status)
            code = code or (_KILLED - ended if ended < 0 else ended)
        elif os.getppid() == caller and not code:
            signal.sigtimedwait({signal.SIGCHLD}, _LOOK)
            continue
        if code or os.getppid() != caller:
            for other in children:
                os.kill(other, signal.SIGKILL)
            break
    os._exit(code)


def _serve(connection: Connection, work: ChunkWork, plan: Plan, *, memory: NDArray[np.uint8], parent: int) -> NoReturn:
    """Do what is asked until the caller is gone."""
    try:
        while True:
            while not connection.poll(_LOOK):
                if os.getppid() != parent:  # another child of the caller may keep the caller's end open
                    os._exit(0)
            what, *asked = connection.recv()
            connection.send(_done(work, plan, what=what, asked=asked, memory=memory))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _done(work: ChunkWork, plan: Plan, *, what: str, asked: list[Any], memory: NDArray[np.uint8]) -> tuple[bool, Any]:
    try:
        if what == "write":
            chunk, offset, rows = asked
            return True, work.write(chunk, _values(plan, chunk, memory[offset:]), rows)
        return True, getattr(work, what)(*asked)
    except Exception as error:  # the caller's to raise
        return False, error


def _values(plan: Plan, chunk: ChunkId, memory: NDArray[np.uint8]) -> NDArray[Any]:
    spec, tokens = plan.component(chunk.component), plan.chunk_tokens[chunk.component]
    dtype = numpy_dtype(spec.dtype)
    return memory[: tokens * spec.width * dtype.itemsize].view(dtype).reshape(tokens, spec.width)


if __name__ == "__main__":
    main()

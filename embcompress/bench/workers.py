"""Tasks of a sweep, done here or shared out to processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from embcompress.bench.execution import Executor, Observers, no_observer
from embcompress.bench.outcomes import failed_record
from embcompress.bench.records import Record, SweepError
from embcompress.bench.settings import Run


@dataclass(frozen=True)
class Task:
    """Runs of one cell that are to be done one after another.

    Attributes:
        runs: what is missing; where the training rows are the same for all seeds, they share what
            short trainings found.
    """

    runs: tuple[Run, ...]

    def execute(self, executor: Executor, observers: Observers = no_observer) -> Iterator[Record]:
        """The record of every run, as it comes."""
        for run in self.runs:
            yield executor.execute(run, observers)


@dataclass(frozen=True)
class WorkerSettings:
    """What a process needs to know: see :class:`~embcompress.bench.settings.SweepSettings`."""

    cache: Path | None
    threads: int
    plan_seconds: float


def execute_in_processes(
    tasks: Sequence[Task], settings: WorkerSettings, processes: int
) -> Generator[Record, None, None]:
    """The records of all runs of all tasks, as they come.

    A process that ends in the middle of a run, killed for its memory say, costs that run alone:
    it becomes a failed record, and another process goes on. The processes end when the iterator
    is closed.

    Raises:
        SweepError: processes end before they do anything.
    """
    queue = list(reversed(tasks))
    workers: dict[Connection, _Worker] = {}
    try:
        while queue or workers:
            while queue and len(workers) < processes:
                worker = _Worker(settings)
                workers[worker.connection] = worker
                worker.begin(queue.pop())
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                worker = workers[connection]
                record, is_alive = worker.receive()
                yield record
                if not is_alive:
                    del workers[connection]
                    if worker.task.runs:
                        queue.append(worker.task)
                elif not worker.task.runs and queue:
                    worker.begin(queue.pop())
                elif not worker.task.runs:
                    worker.close()
                    del workers[connection]
    finally:
        for worker in workers.values():
            worker.kill()


class _Worker:
    """A process and the task that it is at."""

    def __init__(self, settings: WorkerSettings) -> None:
        # A fresh process: a forked one would inherit torch's threads in whatever state they are.
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, settings), daemon=True)
        self.process.start()
        other.close()
        self.task = Task(())
        self.records = 0

    def begin(self, task: Task) -> None:
        self.task = task
        with suppress(BrokenPipeError, ConnectionResetError):  # it ended; receive() says so
            self.connection.send(task)

    def receive(self) -> tuple[Record, bool]:
        """The record of the task's first run, which is taken off it; whether the process lives."""
        try:
            record, is_alive = self.connection.recv(), True
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            if self.records == 0 and code is not None and code > 0:
                raise SweepError(
                    f"a worker process ended at its start, with exit code {code}"
                ) from None
            record, is_alive = failed_record(self.task.runs[0], _reason(code)), False
        self.records += 1
        self.task = Task(self.task.runs[1:])
        return record, is_alive

    def close(self) -> None:
        """End the process, which waits for a task."""
        self.connection.close()
        self.process.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; was there too little memory?" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    return f"the process ended with exit code {code}"


def _work(connection: Connection, settings: WorkerSettings) -> None:
    """What a process does: tasks, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that shares out
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(settings.threads)
    executor = Executor(settings.cache, settings.plan_seconds)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        for record in task.execute(executor):
            try:
                connection.send(record)
            except (BrokenPipeError, ConnectionResetError):
                return  # the sweep was killed; nobody waits for the rest


def _end_with_parent() -> None:
    """Wait for the process that shares out to end, however that happens, and end this one.

    A process that is killed cannot end its children. Nothing is lost in the middle of a run: its
    record is written by the parent, once it is whole.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

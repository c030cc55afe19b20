"""Real process groups for tests: N Gloo processes over a file store, reused from test to test."""

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import traceback

import torch
import torch.distributed as dist

TIMEOUT_S = 60

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "lion_kernels"])


def _serve(rank, world_size, store, pipe):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException as error:  # a CheckpointException is no Exception
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class RankError(Exception):
    """A rank raised; the text is its exception's, one entry a rank."""


class World:
    """``run(function, *args)`` calls function(rank, *args) on every rank and returns the results.

    ``function`` must be importable: a module-level function of a test file.
    """

    def __init__(self, n):
        self.n, self.alive = n, True
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._pipes, self._processes = [], []
        for rank in range(n):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(rank, n, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function, *args):
        outcomes = self.outcomes(function, *args)
        failed = [f"rank {r}: {text}" for r, (ok, text) in enumerate(outcomes) if not ok]
        if failed:
            raise RankError("\n".join(failed))
        return [value for _, value in outcomes]

    def outcomes(self, function, *args):
        """(True, result) or (False, error text) of every rank."""
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self.close()
                raise RankError(f"rank {rank} of {self.n} gave no answer in {TIMEOUT_S} s")
            outcomes.append(pipe.recv())
        return outcomes

    def close(self):
        self.alive = False
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(2)
            process.kill()
        self._folder.cleanup()

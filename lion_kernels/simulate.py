"""Workers in one process: DistributedLions over a loopback, with the same ops, elections and bits
as over a process group.

    models = [copy.deepcopy(model) for _ in range(4)]
    opts = [
        DistributedLion(m.parameters(), lr=1e-4, process_group=wire)
        for m, wire in zip(models, loopback(4))
    ]
    for m, opt in zip(models, opts):
        loss_of(m).backward()
        opt.step()  # the last worker's call finishes the step of all

What every rank must call (the constructor, step, add_param_group, verify_replicas) is called for
one worker after the other. It goes as far as it can on its own and ends within the last worker's
call, which raises the error that real ranks would raise each. Until then, the workers' parameters
are those of before, and their gradients, and learning rates that are tensors, must stay.
"""

from .options import check_integer
from .vote.wire import Loopback


def loopback(n: int) -> list[Loopback]:
    """The ends of ``n`` workers, one each, in the order of their ranks; raises ValueError."""
    workers: list[Loopback] = []
    n = check_integer("n", n, "at least 1", low=1)
    workers += [Loopback(rank, n, workers) for rank in range(n)]
    return workers

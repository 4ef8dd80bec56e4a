"""What befalls a run from outside: signals, an error on one rank, numbers that are not finite.

All ranks act alike and at the same step; otherwise those that go on would wait for those that are gone.

    kill -USR1 PID                                  # of one training process: save, go on
    kill PID-OF-TORCHRUN                            # save, leave; torchrun kills after --shutdown_timeout seconds
"""

import contextlib
import datetime
import json
import math
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from common import fail, rank, world_size

# ---- Signals ---------------------------------------------------------------------------------------------------------

SAVE = 1                                            # what a signal asks for: a checkpoint, and if more, to leave with
ASKS = {signal.SIGUSR1: SAVE, signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM}  # that code


class Signals:
    """Notes signals until the loop asks for them; a second SIGINT ends the process as it always did."""

    def __init__(self):
        self.noted, self.group, self.usual = [], None, {}

    def install(self):
        """From here on there is something to save; before, and after `restore`, signals do what they always do."""
        if world_size() > 1:                        # a group of the processors: asking does not wait for the GPU
            self.group = dist.new_group(backend="gloo")
        self.noted.clear()
        self.usual = {number: signal.signal(number, self.note) for number in ASKS}

    def restore(self):
        for number, handler in self.usual.items():
            signal.signal(number, handler)
        self.usual, self.group = {}, None           # whose threads would outlive the interpreter, and may abort it

    def note(self, number, frame):
        self.noted.append(ASKS[number])
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def asked(self):
        """0, SAVE, or the exit code to leave with: the most that any rank was asked for since the last call."""
        most = torch.tensor(0)
        while self.noted:                           # one by one: another may come at any moment
            most.clamp_(min=self.noted.pop())
        if world_size() > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        return int(most)


SIGNALS = Signals()                                 # handlers belong to the process, so there is one


# ---- An error on one rank --------------------------------------------------------------------------------------------

def _store(timeout):
    """The key-value store of this process group: that of torchrun, or of rank 0. Every call is a connection."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         timeout=datetime.timedelta(seconds=timeout))


def _key():
    return f"failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _watch(me):
    """Wait for another rank's failure and end this process then, whatever collective it is in."""
    try:
        store = _store(timeout=300)
        store.wait([_key()], datetime.timedelta(days=1000))
        message = store.get(_key()).decode()
    except (RuntimeError, OSError):                 # the store has gone, and with it whoever could have failed
        return
    if not message.startswith(f"{me}: "):
        os.write(2, f"{me}: stopped, because of {message}\n".encode())
        os._exit(1)


@contextlib.contextmanager
def together():
    """Around a whole script: an error on one rank ends all of them at once, with that rank's message.

    The first to fail leaves its message in the store where every other rank has a thread waiting for it: no collective
    is waited for. An OSError (disk full, folder gone) is one line. Exit codes that ranks agreed on are left alone.
    """
    me = f"rank {os.environ.get('RANK', 0)}"
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if not alone:
        threading.Thread(target=_watch, args=[me], daemon=True).start()
    try:
        try:
            yield
        except OSError as error:
            fail(error)
    except BaseException as error:
        if alone or isinstance(error, SystemExit) and isinstance(error.code, int | None):
            raise
        _leave(me, error)
    finally:
        SIGNALS.restore()


def _leave(me, error):
    """Say what went wrong, here and to the other ranks, and end this process without waiting for anything."""
    mine = first = f"{me}: {error if isinstance(error, SystemExit) else f'{type(error).__name__}: {error}'}"
    store = None
    with contextlib.suppress(RuntimeError, OSError):        # without a store it is still said here
        store = _store(timeout=5)
        if store.check([_key()]):
            first = store.get(_key()).decode()
    sys.stdout.flush()
    if first == mine:
        os.write(2, f"{mine}\n".encode())
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        with contextlib.suppress(RuntimeError, OSError):    # last: once the others leave, torchrun ends this one too
            if store:                               # which goes with rank 0, should that leave at this moment
                store.compare_set(_key(), "", mine)
    else:                                           # most likely a broken connection: what broke it says more
        os.write(2, f"{me}: stopped, because of {first}\n".encode())
    os._exit(1)


# ---- Numbers that are not finite -------------------------------------------------------------------------------------

PATIENCE = 3                                        # updates in a row that one may miss

class Finite(nn.Module):
    """Counts the updates that did not happen because a gradient was not finite; ends the run after PATIENCE in a row.

    What is seen is the gradient norm over all ranks, so all ranks see the same; a loss that is not finite must make its
    gradients so. Counts are buffers: they belong into the checkpoint.
    """

    def __init__(self, folder, names):
        super().__init__()
        self.folder, self.names = Path(folder), list(names)
        self.register_buffer("row", torch.zeros(len(self.names), dtype=torch.long))     # skipped in a row, by network
        self.register_buffer("total", torch.zeros((), dtype=torch.long))

    def check(self, step, name, norm, batches, **losses):
        """Did the update of network `name` happen? If not, each rank adds a line to nonfinite-RANK.jsonl.

        `batches` (data.Batch) and `losses` are what the gradients came from.
        """
        at = self.names.index(name)
        if math.isfinite(norm):
            self.row[at] = 0
            return True
        self.row[at] += 1
        self.total += 1
        line = {"step": step, "network": name, "norm": float(norm), **{k: float(v) for k, v in losses.items()},
                "samples": [i for batch in batches for i in batch.ids],
                "not_finite_themselves": [i for batch in batches for i, x in zip(batch.ids, batch.x0)
                                          if not x.isfinite().all()]}
        file = self.folder / f"nonfinite-{rank()}.jsonl"
        with open(file, "a") as out:
            out.write(json.dumps(line) + "\n")
        if rank() == 0:
            print(f"warning, step {step}: the gradients of {name} are not finite; no rank changes a weight "
                  f"({int(self.row[at])} in a row, {int(self.total)} in all; see {file})", file=sys.stderr)
        if self.row[at] >= PATIENCE:
            fail(f"the gradients of {name} were not finite for {PATIENCE} updates in a row; they changed no weight. "
                 f"Losses and clips are in {self.folder}/nonfinite-*.jsonl; checkpoints and their networks are well")
        return False

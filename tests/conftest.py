"""With several workers (pytest-xdist) each has a core of its own: threads that fight over one cost more than they give."""

import os

worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})       # inherited by what tests start
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")                   # read when torch is imported

"""The worker's side of `tests.helpers.ranks`: reads a job, becomes that rank, answers, resets, waits for the next.

Started as `python -m tests.helpers.rank_worker FD`, where FD is the worker's end of the pipe.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection

from tests.helpers.ranks import Job, Reply
from tests.helpers.reset import leave_group, reset_singletons, reset_torch


def run(job: Job) -> Reply:
    """Runs one job; whatever it raises becomes part of the reply."""
    import torch.distributed

    reply = Reply(job.number, job.rank)
    failed = True
    try:
        if job.join:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=job.group_timeout))
        fn, args, kwargs = pickle.loads(job.work)
        reply.value = pickle.dumps(fn(*args, **kwargs))
        failed = False
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the test decides what they mean
        reply.kind = type(error).__name__
        reply.text = "".join(traceback.format_exception(error))
        reply.exception = dump_exception(error)
        # The frames hold models and, through them, the group.
        traceback.clear_frames(error.__traceback__)
        del error
    try:
        # A failed rank leaves at once: its closed connections make the others' collectives fail, instead of waiting.
        leave_group(barrier=not failed)
    except Exception as error:
        if not failed:
            reply.value = None
            reply.kind = f"{type(error).__name__} while leaving the group"
            reply.text = "".join(traceback.format_exception(error))
    return reply


def dump_exception(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error)
    except Exception:  # not every exception can be pickled: its traceback travels as text beside it
        return None


def reset(environment: dict[str, str], directory: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    reset_singletons()
    reset_torch(threads=1)


def main(descriptor: int) -> None:
    import torch.distributed

    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends its workers
    torch.set_num_threads(1)
    connection = Connection(descriptor)
    gc.collect()
    gc.freeze()  # torch's own objects never die; left in, they make the collection after each call take 100 ms
    warnings.filterwarnings("error", module=r"accelerate(\.|$)")  # as in the tests' own process
    environment, directory = dict(os.environ), os.getcwd()
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            sys.stdout.flush()
            os._exit(0)  # not through gloo's destructors
        assert isinstance(job, Job)
        sys.path[:] = job.path
        os.environ.update(job.environment)
        reset_torch(threads=1)
        with warnings.catch_warnings():
            reply = run(job)
        reset(environment, directory)
        connection.send_bytes(pickle.dumps(reply))  # at once: the first to fail is to be the first to be heard of
        del reply, job
        gc.collect()
        gc.freeze()  # the libraries that the job has imported


if __name__ == "__main__":
    main(int(sys.argv[1]))

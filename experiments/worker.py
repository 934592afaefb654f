"""A process that trains runs for a command, one after the other, with one thread: `python -m experiments.worker FD`.

It is told what to train through a connection, file descriptor FD, and answers there; see `experiments.pool`, which starts it. When the
connection ends, because the command has or was killed, so does the worker: a run that is under way saves a checkpoint if it can soon.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

GRACE = 10.0  # seconds for a checkpoint when the command is gone


def main(descriptor: int) -> None:
    """Trains until it is told None."""
    os.set_inheritable(descriptor, False)
    connection, inbox = Connection(descriptor), queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True, name="listen").start()

    trainer = pickle.loads(inbox.get())

    import jax

    from experiments import environment
    from experiments.claims import Busy
    from moejax.core.errors import ConfigError
    from moejax.train.stops import Interrupted

    jax.devices()
    environment.keep_freed_memory()
    while (message := inbox.get()) is not None:
        job = pickle.loads(message)
        try:
            run = trainer.train(job, lambda report: connection.send(("progress", report)))
            answer: tuple[str, Any] = ("done", run.cached)
        except Busy:
            answer = ("busy", None)
        except Interrupted as stop:
            connection.send(("stopped", stop.step))
            _leave(128 + stop.signum)
        except ConfigError as error:
            answer = ("mistake", str(error))
        except Exception as error:
            answer = ("failed", trainer.describe(error, job))
        connection.send(answer)
    _leave(0)


def _leave(status: int) -> None:
    """Ends the process at once: Python's own way out would wait for threads that still read data."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _listen(connection: Connection, inbox: "queue.SimpleQueue[bytes | None]") -> None:
    """Passes messages on; an empty one is None. They are read at once, and so is the end of the connection."""
    try:
        while True:
            inbox.put(connection.recv_bytes() or None)
    except (EOFError, OSError):
        inbox.put(None)
    timer = threading.Timer(GRACE, os._exit, (128 + signal.SIGTERM,))
    timer.daemon = True
    timer.start()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(int(sys.argv[1]))

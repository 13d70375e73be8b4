"""The chunks of experiments, sampled by a Ray cluster: the one that the environment variable RAY_ADDRESS names.

Every machine of the cluster has this checkout in the same folder, set up with `make setup`, and runs Ray by that checkout's
Python (`.venv/bin/ray start ...`). Each CPU has a worker of its own, or each GPU where the cluster has any. What the workers
sample comes back and is kept where the command runs; a worker that dies is started again, and its chunk goes to another.
"""

import contextlib
import os
import pathlib
import signal
import socket
import sys
import urllib.parse

from experiment_rows import CHUNK

TOOLS = pathlib.Path(__file__).resolve().parent


def is_wanted():
    """Tell whether a cluster is named."""
    return bool(os.environ.get("RAY_ADDRESS"))


class _Worker:
    """Samples in a process of the cluster."""

    def made(self, chunk):
        import experiment_samples

        return chunk, experiment_samples.made(chunk)

    def at_once(self):
        import experiment_samples

        return experiment_samples.at_once()


def _workers(ray, most):
    """Return the workers of the cluster, no more than `most`. Raises ValueError where there is nothing to compute on."""
    found = ray.cluster_resources()
    each = {"num_gpus": 1} if found.get("GPU") else {"num_cpus": 1}
    count = int(found.get("GPU") or found.get("CPU", 0))
    if not count:
        raise ValueError("RAY_ADDRESS: the cluster has neither a CPU nor a GPU; add a worker.")
    worker = ray.remote(_Worker).options(max_restarts=-1, max_task_retries=-1, **each)
    return [worker.remote() for _ in range(min(count, most))]


def _check_that_it_answers(address):
    """Raise OSError where nothing listens at a "host:port", for which Ray itself waits for minutes."""
    at = urllib.parse.urlsplit("//" + address.split("://")[-1])
    if at.port:
        socket.create_connection((at.hostname, at.port), timeout=10).close()


def _join(ray):
    """Connect this process to the cluster. Raises ValueError where none answers."""
    address = os.environ["RAY_ADDRESS"]
    variables = {"PYTHONPATH": str(TOOLS), "OMP_NUM_THREADS": "1"}
    try:
        _check_that_it_answers(address)
        ray.init(address, runtime_env={"env_vars": variables}, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"RAY_ADDRESS: no cluster answers at '{address}'; name one that runs.") from error


@contextlib.contextmanager
def _cluster():
    """Ray, connected to the cluster. Raises ValueError where Ray is not installed, and what `_join` raises."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("RAY_ADDRESS: Ray is not installed; install the extra 'ray', or unset the variable.") from error
    terminated = signal.getsignal(signal.SIGTERM)
    _join(ray)
    signal.signal(signal.SIGTERM, terminated)  # Ray has set its own
    try:
        yield ray
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        ray.shutdown()


def sampled(chunks, store):
    """Sample Chunks into a store; yield each when it is there. Raises ValueError where the cluster does not answer or has
    nothing to compute on, and what `Sampler.chunk` raises.
    """
    with _cluster() as ray:
        from ray.util import ActorPool

        pool = ActorPool(_workers(ray, len(chunks)))
        for chunk, content in pool.map_unordered(lambda worker, chunk: worker.made.remote(chunk), list(chunks)):
            store.save(chunk, content)
            yield chunk


def at_once():
    """Return how many images the cluster's workers sample at once: as many as each of them does, 8 where there is no GPU.
    Raises as `sampled`.
    """
    with _cluster() as ray:
        if not ray.cluster_resources().get("GPU"):
            return CHUNK
        return min(ray.get([worker.at_once.remote() for worker in _workers(ray, sys.maxsize)]))

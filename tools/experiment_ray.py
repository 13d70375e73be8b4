"""Sample the chunks of experiments on a Ray cluster: the one that the environment variable RAY_ADDRESS names.

Every machine of the cluster has this checkout in the same folder, set up with `make setup`, and runs Ray with that checkout's
Python (`.venv/bin/ray start ...`). There is one worker per CPU, or one per GPU if the cluster has any. The samples are sent
back and kept on the machine where the command runs. A worker that dies is started again, and its chunk goes to another worker.
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
    """Return whether RAY_ADDRESS names a cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


class _Worker:
    """Sample in a process of the cluster."""

    def made(self, chunk):
        import experiment_samples

        return chunk, experiment_samples.made(chunk)

    def at_once(self):
        import experiment_samples

        return experiment_samples.at_once()


def _workers(ray, most):
    """Return the workers of the cluster, at most `most`. Raises ValueError if the cluster has nothing to compute on."""
    found = ray.cluster_resources()
    each = {"num_gpus": 1} if found.get("GPU") else {"num_cpus": 1}
    count = int(found.get("GPU") or found.get("CPU", 0))
    if not count:
        raise ValueError("RAY_ADDRESS: the cluster has neither a CPU nor a GPU; add a worker.")
    worker = ray.remote(_Worker).options(max_restarts=-1, max_task_retries=-1, **each)
    return [worker.remote() for _ in range(min(count, most))]


def _check_that_it_answers(address):
    """Raise OSError if nothing listens at a "host:port"; Ray itself would wait for minutes."""
    at = urllib.parse.urlsplit("//" + address.split("://")[-1])
    if at.port:
        socket.create_connection((at.hostname, at.port), timeout=10).close()


def _join(ray):
    """Connect this process to the cluster. Raises ValueError if no cluster answers."""
    address = os.environ["RAY_ADDRESS"]
    variables = {"PYTHONPATH": str(TOOLS), "OMP_NUM_THREADS": "1"}
    try:
        _check_that_it_answers(address)
        ray.init(address, runtime_env={"env_vars": variables}, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"RAY_ADDRESS: no cluster answers at '{address}'; name one that runs.") from error


@contextlib.contextmanager
def _cluster():
    """Return Ray, connected to the cluster. Raises ValueError if Ray is not installed, and the errors of `_join`."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("RAY_ADDRESS: Ray is not installed; install the extra 'ray', or unset the variable.") from error
    terminated = signal.getsignal(signal.SIGTERM)
    _join(ray)
    signal.signal(signal.SIGTERM, terminated)  # Ray has set its own handler
    try:
        yield ray
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        ray.shutdown()


def sampled(chunks, store):
    """Sample Chunks into a store; yield each chunk when it is there.

    Raises ValueError if the cluster does not answer or has nothing to compute on, and the errors of `Sampler.chunk`.
    """
    with _cluster() as ray:
        from ray.util import ActorPool

        pool = ActorPool(_workers(ray, len(chunks)))
        for chunk, content in pool.map_unordered(lambda worker, chunk: worker.made.remote(chunk), list(chunks)):
            store.save(chunk, content)
            yield chunk


def at_once():
    """Return how many images each worker of the cluster samples at once; 8 without a GPU. Raises as `sampled`."""
    with _cluster() as ray:
        if not ray.cluster_resources().get("GPU"):
            return CHUNK
        return min(ray.get([worker.at_once.remote() for worker in _workers(ray, sys.maxsize)]))

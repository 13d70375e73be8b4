"""Make the host-free core importable as `iec_core`, and check that every test leaves the process unchanged."""

import os

import dummy_models
import pack
import pytest
import server
import torch

pack.load("iec_core")


# Variables that pytest and torch set by themselves.
OWN_VARIABLES = (
    "PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
)  # fmt: skip


def process_state():
    """Return, by name, the state that tests of the same process share and could silently change."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    return {
        **environment,
        "working directory": os.getcwd(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


# The files whose tests share a server. A run in several processes runs them all in one process, with one server and one
# browser.
SHARING = ("browser/", "host/test_example_workflows.py", "host/test_headless.py", "host/test_inputs.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Change `--dist loadfile` so that the files of SHARING count as one file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "shared server" if nodeid.startswith(SHARING) else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory):
    """Return a server with the pack and the model files that the example workflows name.

    All tests of a process that can use a server in any state share it, because a start takes as long as some tens of tests.
    """
    models = dummy_models.write(tmp_path_factory.mktemp("models"))
    with server.serve(tmp_path_factory.mktemp("output"), models=models) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """Check that no test leaves changes, because tests run in any order.

    Fixtures that several tests share are set up before this check begins.

    On the shared server, the history is cleared: a prompt with NaN in it, which no browser reads as JSON, breaks every page.
    """
    before = process_state()
    yield
    after = process_state()
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == set()
    if "shared_server" in request.fixturenames:
        assert request.node.nodeid.startswith(SHARING)
        request.getfixturevalue("shared_server").clear_history()

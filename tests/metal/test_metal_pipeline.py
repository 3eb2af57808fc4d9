"""One command buffer per token: whole models against the plain form, with the core that hostlib builds.

The cases are in `pipeline_cases.py`, which a child pytest runs with `metal_core_plugin`.
"""

import os

import pytest
from conftest import HERE, in_child
from test_metal_engine import run

pytest.importorskip("pybind11", reason="pip install pybind11: builds a core with Metal in it")
pytest.importorskip(
    "flashmoe", reason="the package is not installed: sh tools/setup.sh test", exc_type=ImportError
)
pytestmark = in_child
CASES = str(HERE / "pipeline_cases.py")


def test_cases():
    run(CASES)


def test_late_device():
    """The device does no more than the host's waits ask for: what is read too early is wrong."""
    run(CASES, "-k", "mlx4 or failed_reads or finite", env={"FAKE_METAL_LATE": "1"})


@pytest.mark.slow
def test_every_model():
    run(CASES, "-k", "same_bits", env={"PIPELINE_ALL": "1"})


@pytest.mark.slow
def test_plain_form_of_the_core_tests():
    """The core's tests of sequences and faults with a submission per step, as before."""
    env = {**os.environ, "METAL_CORE_ROWS": "1", "FLASHMOE_CPU": "ref", "FLASHMOE_PIPELINE": "0"}
    run("test_session.py", "test_faults.py", "-k", "not avx", env=env)

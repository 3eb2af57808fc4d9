"""One command buffer per token: whole models against the plain form, with the core that hostlib builds.

The cases are in `pipeline_cases.py`, which a child pytest runs with `metal_core_plugin`.
"""

import hostlib
import pytest
from conftest import HERE, assert_clean, in_child, sanitizer_env
from test_metal_engine import ROWS
from test_metal_engine import run as run_core

pytest.importorskip("pybind11", reason="pip install pybind11: builds a core with Metal in it")
pytest.importorskip(
    "flashmoe", reason="the package is not installed: sh tools/setup.sh test", exc_type=ImportError
)
pytestmark = in_child
CASES = str(HERE / "pipeline_cases.py")


def run_cases(*select, env):
    """A child pytest on the core that METAL_CORE_PATH names, else the sound one; (status, output)."""
    out = run_core(env, list(select))
    return out.returncode, out.stdout[-6000:] + out.stderr[-2000:]


def run(*select, env=None):
    status, output = run_cases(*select, env=env or {})
    assert status == 0, output


def test_cases():
    run(CASES)


@pytest.mark.parametrize("mode", ["FAKE_METAL_LATE", "FAKE_METAL_EAGER"])
def test_extreme_devices(mode):
    """Late: the device does no more than the host's waits ask for, so what is read too early is
    wrong. Eager: it uses at once what the host allows, so what is written after that is too late."""
    run(CASES, "-k", "mlx4 or failed_reads or finite", env={mode: "1"})


@pytest.mark.slow
def test_every_model():
    run(CASES, "-k", "same_bits", env={"PIPELINE_ALL": "1"})


@pytest.mark.slow
def test_plain_form_of_the_core_tests():
    """The core's tests of sequences and faults with a submission per step, as before."""
    run("test_session.py", "test_faults.py", env={**ROWS, "FLASHMOE_PIPELINE": "0"})


@pytest.mark.slow
@pytest.mark.parametrize("san", ["thread", "address", "undefined"])
def test_sanitizers(san):
    """Device, host and reads at once: what one side writes while the other reads would be a race."""
    env = {**sanitizer_env(san), "METAL_CORE_PATH": str(hostlib.build_core(san))}
    cases = "same_bits and mlx4 or failed_reads or failed_late or cancel"
    assert_clean(*run_cases(CASES, "-k", cases, env=env))

"""`bench_experts` under pytest-benchmark: few slots from disk, then all experts resident."""

import pytest

SMALL = [
    "--hidden",
    "1024",
    "--width",
    "256",
    "--layers",
    "2",
    "--experts",
    "64",
    "--k",
    "4",
    "--tokens",
    "16",
    "--runs",
    "2",
]


@pytest.mark.parametrize("slots", [16, 128])
def test_bench_experts(measure, tmp_path, slots):
    (line,) = measure(
        "bench_experts", "--path", tmp_path / "experts", "--slots", slots, "--cached", *SMALL
    )
    assert line["tokens_per_s"] > 0

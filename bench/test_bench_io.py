"""`bench_io` under pytest-benchmark, on a file beside the other temporary ones."""


def test_bench_io(measure, tmp_path):
    options = [
        "--size",
        "64M",
        "--blocks",
        "64K,1M",
        "--depths",
        "1,8",
        "--runs",
        "2",
        "--seconds",
        "0.1",
    ]
    lines = measure("bench_io", "--file", tmp_path / "data", *options)
    assert lines[-1]["bench"] == "io_best"
    assert all(line["gb_per_s"] > 0 for line in lines)

"""`bench_router` under pytest-benchmark."""


def test_bench_router(measure):
    lines = measure("bench_router", "--runs", 5)
    assert {line["experts"] for line in lines} == {256, 512}
    assert all(line["us"] > 0 for line in lines)

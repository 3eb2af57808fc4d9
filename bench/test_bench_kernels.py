"""`bench_kernels` under pytest-benchmark: one benchmark per kind of kernel and numeric mode."""

import pytest


@pytest.mark.parametrize("numeric", ["exact", "fast"])
@pytest.mark.parametrize("only", ["matvec", "matmul"])
def test_bench_products(measure, only, numeric):
    lines = measure("bench_kernels", "--only", only, "--numeric", numeric, "--runs", 3)
    assert lines[0]["op"] == "peaks"
    assert {line["op"] for line in lines[1:]} == {only}
    assert {line["numeric"] for line in lines[1:]} == {numeric}


def test_bench_sequence(measure):
    """Attention at 4K and 32K positions, in every KV format, and DeltaNet."""
    lines = measure("bench_kernels", "--only", "sequence", "--runs", 3)
    names = {line["op"] for line in lines}
    assert {f"attention decode, 32k {f}" for f in ("f32", "f16", "bf16")} <= names
    assert all(line["us_per_row"] > 0 for line in lines[1:])

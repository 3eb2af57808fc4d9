"""Write the safetensors files that must be refused, one reason each, and CASES.json.

    python tests/golden_errors/make_errors.py
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
MORE = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def file(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """Return a file; `header` is an object or the header's bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**changes: object) -> bytes:
    """Return a file whose second tensor is changed."""
    return file({"a": GOOD, "b": {**MORE, **changes}})


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven_bytes": (bytes(7), "too short"),
    "header_beyond_file": (file({"a": GOOD}, length=10_000), "header ends at 10008"),
    "header_length_huge": (file({"a": GOOD}, length=(1 << 64) - 1), "18446744073709551615"),
    "header_truncated": (file({"a": GOOD, "b": MORE})[:40], "header ends at"),
    "header_empty": (file(b""), "does not begin with"),
    "header_list": (file([1, 2]), "does not begin with"),
    "header_leading_space": (file(b" {}", b""), "does not begin with"),
    "header_not_json": (file(b'{"a": }'), "not valid JSON"),
    "header_not_utf8": (file(b'{"\xff": 1}'), "not valid JSON"),
    "header_nan": (file(b'{"a": NaN}'), "NaN"),
    "header_deep": (file(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "name_twice": (file(b'{"a":1,"a":2}'), "'a' appears twice"),
    "field_twice": (file(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "'dtype' appears twice"),
    "metadata_not_strings": (file({"__metadata__": {"x": 1}, "a": GOOD}, bytes(8)), "__metadata__"),
    "tensor_not_object": (file({"a": GOOD, "b": 5}), "'b'"),
    "field_missing": (file({"a": GOOD, "b": {"dtype": "F32", "shape": [2]}}), "data_offsets"),
    "field_unknown": (one(stride=[1]), "'b'"),
    "dtype_unknown": (one(dtype="F33"), "unknown dtype 'F33'"),
    "dtype_number": (one(dtype=4), "unknown dtype 4"),
    "shape_negative": (one(shape=[-2]), "bad shape [-2]"),
    "shape_float": (one(shape=[2.0]), "bad shape"),
    "shape_bool": (one(shape=[True, 2]), "bad shape"),
    "shape_string": (one(shape="2"), "bad shape"),
    "shape_too_deep": (one(shape=[1] * 9), "bad shape"),
    "shape_huge": (one(shape=[1 << 61, 1 << 61]), "needs"),
    "shape_disagrees": (one(shape=[3]), "span 8 bytes"),
    "offsets_reversed": (one(data_offsets=[16, 8]), "span -8 bytes"),
    "offsets_negative": (one(data_offsets=[-8, 0]), "bad data_offsets"),
    "offsets_three": (one(data_offsets=[8, 16, 24]), "bad data_offsets"),
    "offsets_huge": (one(data_offsets=[1 << 61, (1 << 61) + 8]), "ends at"),
    "offsets_float": (one(data_offsets=[8.0, 16.0]), "bad data_offsets"),
    "beyond_file": (one(data_offsets=[16, 24]), "ends at"),
    "overlap": (one(data_offsets=[4, 12]), "overlap"),
    "same_bytes": (one(data_offsets=[0, 8]), "overlap"),
    "hole": (file({"a": GOOD, "b": {**MORE, "data_offsets": [12, 20]}}, bytes(20)), "hole"),
    "hole_at_front": (file({"b": MORE}), "hole"),
    "bytes_left_over": (file({"a": GOOD}), "the tensors end at"),
    "no_tensors_but_data": (file({}), "the tensors end at"),
}


def main() -> None:
    """Write all files."""
    for name, (data, _) in CASES.items():
        (HERE / f"{name}.safetensors").write_bytes(data)
    words = {f"{name}.safetensors": word for name, (_, word) in sorted(CASES.items())}
    (HERE / "CASES.json").write_text(json.dumps(words, indent=1) + "\n")


if __name__ == "__main__":
    main()

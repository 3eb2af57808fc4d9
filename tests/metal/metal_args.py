"""The structs and constants of metal/metal_args.h, read from the header itself."""

import ctypes as C
import re

import mslc

_TEXT = (mslc.REPO / "metal" / "metal_args.h").read_text()
_TYPES = {"fm_u32": C.c_uint32, "fm_i32": C.c_int32, "float": C.c_float}


def _constants():
    out = {}
    for body in re.findall(r"enum \{(.*?)\};", _TEXT, re.S):
        for name, value in re.findall(r"(FM_\w+)\s*=\s*(\d+)", body):
            out[name] = int(value)
    return out


def _structs():
    out = {}
    text = re.sub(r"/\*.*?\*/", "", _TEXT, flags=re.S)
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, re.S):
        fields = []
        for line in filter(None, (part.strip() for part in body.split(";"))):
            pointer = re.match(r"FM_PTR\(.*?\) (\w+)$", line)
            if pointer:
                fields.append((pointer.group(1), C.c_uint64))
                continue
            kind, names = line.split(None, 1)
            fields += [(n.strip(), _TYPES[kind]) for n in names.split(",")]
        made = type(name, (C.Structure,), {"_fields_": fields})
        size = int(re.search(rf"FM_ASSERT_SIZE\({name}, (\d+)\)", text).group(1))
        assert C.sizeof(made) == size, name
        out[name] = made
    return out


CONST = _constants()
STRUCT = _structs()


def args(name, **values):
    """A struct of the header by name; unknown fields are an error, missing ones zero."""
    made = STRUCT[name]()
    known = {f[0] for f in made._fields_}
    assert set(values) <= known, set(values) - known
    for key, value in values.items():
        setattr(made, key, value)
    return made


def table(structs):
    """An array of structs as bytes for a buffer."""
    return b"".join(bytes(s) for s in structs)

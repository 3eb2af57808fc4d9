"""Join the shaders into one source text and write it as a C array: no path is needed at run time.

Usage: python metal/embed.py OUT.c   (or import `source` for the text)
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include "([^"]+)"[^\n]*\n', re.M)


def source(folder=HERE / "kernels"):
    """All .metal files of `folder` with quoted includes pasted in once; <metal_stdlib> stays."""
    seen = set()

    def paste(path):
        def one(match):
            name = match.group(1)
            found = next(p for p in (path.parent / name, HERE / name) if p.exists())
            if found.name in seen:
                return ""
            seen.add(found.name)
            return paste(found)

        return INCLUDE.sub(one, path.read_text())

    return "".join(f"// ---- {p.name}\n{paste(p)}" for p in sorted(Path(folder).glob("*.metal")))


def as_c(text):
    """`text` as the definition of fm_metal_source; one string per line keeps compilers happy."""
    lines = []
    for line in text.split("\n"):
        escaped = line.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'"{escaped}\\n"')
    return (
        "extern const char fm_metal_source[];\nconst char fm_metal_source[] =\n"
        + "\n".join(lines)
        + ";\n"
    )


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_c(source()))

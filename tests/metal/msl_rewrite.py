"""Rewrite one preprocessed .metal file into C++ that clang compiles for a CPU or for CUDA.

Owns the token-level differences between MSL and C++: attributes, threadgroup variables, vector
constructors and casts, unsuffixed float literals, function constants.  Knows nothing of
compilers or files; what it cannot read it refuses (MslError), it never guesses.

The subset: no kernel templates, no lambdas, no pragma that changes meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|\#[^\n]*(?:\\\n[^\n]*)*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])'|\s+"""
    r"""|[A-Za-z_]\w*|0[xX][0-9a-fA-F]+[uUlL]*|\.?\d(?:[eEpP][+-]|[\w.])*|\[\["""
    r"""|\]\]|::|<<=|>>=|->|[-+*/%&|^=!<>]=|&&|\|\||<<|\+\+|--|.""",
    re.S,
)
SCALARS = [
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "float",
    "half",
    "bfloat",
    "bool",
]
VECTORS = {s + n for s in SCALARS for n in "234"}
IDENT = re.compile(r"[A-Za-z_]\w*$")
FLOAT_LITERAL = re.compile(r"(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?$")

# The order is the numbering of MSL_B_* in runtime/msl_abi.h.
BUILTINS = [
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "dispatch_threads_per_threadgroup",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
]
ATTRIBUTES = {
    "buffer",
    "threadgroup",
    "function_constant",
    "kernel",
    "max_total_threads_per_threadgroup",
    "maybe_unused",
    "unroll",
    "fallthrough",
}
ADDRESS_SPACES = {"device", "constant", "threadgroup"}


class MslError(Exception):
    """The source is not in the subset, or Metal's compiler would refuse it."""


@dataclass
class Param:
    """One kernel parameter. `kind` 1 buffer, 2 threadgroup memory, 3 builtin."""

    kind: int
    index: str
    name: str
    writable: bool


@dataclass
class Kernel:
    name: str
    params: list[Param]
    max_threads: str = "0"


@dataclass
class Unit:
    """What `rewrite` found in a source: the tables that the generated library exports."""

    kernels: list[Kernel] = field(default_factory=list)
    constants: list[tuple[str, str, str]] = field(default_factory=list)  # type, name, index
    n_threadgroup_vars: int = 0


def is_blank(text):
    return text.isspace() or text.startswith(("//", "/*", "#"))


def scan(source):
    """Tokens as (text, line number)."""
    out, line = [], 1
    for match in TOKEN.finditer(source):
        text = match.group(0)
        out.append((text, line))
        line += text.count("\n")
    return out


class Rewriter:
    """One pass over the tokens. `mode` is "run", "check" or "cuda"."""

    def __init__(self, source, mode, values=None):
        source = re.sub(r"\[\[\s*kernel\s*\]\]", " kernel ", source)
        self.mode = mode
        self.values = values or {}
        self.unit = Unit()
        self.tokens = scan(source)
        self.markers = []
        for number, text in enumerate(source.split("\n"), 1):
            match = re.match(r'# (\d+) "([^"]*)"', text)
            if match:
                self.markers.append((number, int(match.group(1)), match.group(2)))

    # ---- places and neighbours

    def place(self, line):
        file, number = "?", line
        for at, first, name in self.markers:
            if at > line:
                break
            file, number = name, first + line - at - 1
        return f"{file}:{number}"

    def refuse(self, line, why):
        raise MslError(f"{self.place(line)}: {why}")

    def text(self, i):
        return self.tokens[i][0] if 0 <= i < len(self.tokens) else ""

    def near(self, i, step=1):
        """Index of the next (or previous) token that is not white space or a comment."""
        i += step
        while 0 <= i < len(self.tokens) and is_blank(self.text(i)):
            i += step
        return i

    def closing(self, i, opening, closing):
        depth = 0
        while i < len(self.tokens):
            if self.text(i) == opening:
                depth += 1
            elif self.text(i) == closing:
                depth -= 1
                if depth == 0:
                    return i
            i += 1
        raise MslError(f"{self.place(self.tokens[-1][1])}: '{opening}' is never closed")

    def until(self, i, *stops):
        while i < len(self.tokens) and self.text(i) not in stops:
            i += 1
        return i

    # ---- kernels and their parameters

    def split(self, tokens):
        out, current, depth = [], [], 0
        for token in tokens:
            if token[0] in ("(", "[", "{", "<", "[["):
                depth += 1
            elif token[0] in (")", "]", "}", ">", "]]"):
                depth -= 1
            if token[0] == "," and depth == 0:
                out.append(current)
                current = []
            else:
                current.append(token)
        if any(not is_blank(t[0]) for t in current):
            out.append(current)
        return out

    def param(self, tokens):
        real = [t for t in tokens if not is_blank(t[0])]
        line = real[0][1]
        source = "".join(t[0] for t in tokens)
        words = [t[0] for t in real]
        if "[[" in words:
            words = words[: words.index("[[")]
        name = [w for w in words if IDENT.match(w)][-1]
        pointer = "*" in words or "&" in words
        if pointer and not ADDRESS_SPACES & set(words):
            self.refuse(line, f"kernel parameter {name} is a pointer without an address space")
        attribute = re.search(r"\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?", source)
        if not attribute:
            self.refuse(line, f"kernel parameter {name} has no attribute; the subset wants one")
        kind, index = attribute.groups()
        writable = "constant" not in words and "const" not in words
        if kind in ("buffer", "threadgroup"):
            if not pointer:
                self.refuse(line, f"kernel parameter {name} must be a pointer or a reference")
            return Param(1 if kind == "buffer" else 2, index, name, writable)
        if kind in BUILTINS:
            return Param(3, "MSL_B_" + kind, name, False)
        self.refuse(line, f"attribute [[{kind}]] is not known for a kernel parameter")
        return None

    def params(self, tokens):
        found = [self.param(p) for p in self.split(tokens)]
        for kind in (1, 2):
            indices = [p.index for p in found if p.kind == kind]
            if len(set(indices)) != len(indices):
                self.refuse(tokens[0][1], "two parameters have the same buffer index")
        return found

    def kernel(self, i, max_threads):
        j = i + 1
        while self.text(j) != "(":
            if self.text(j) == "[[":
                while self.text(j) != "]]":
                    if self.text(j) == "max_total_threads_per_threadgroup":
                        max_threads = self.text(self.near(self.near(j)))
                    j += 1
            j += 1
        name = self.text(self.near(j, -1))
        end = self.closing(j, "(", ")")
        params = self.params(self.tokens[j + 1 : end])
        self.unit.kernels.append(Kernel(name, params, max_threads or "0"))

    # ---- declarations

    def function_constant(self, i):
        """`constant T name [[function_constant(n)]];`: returns (C++ text, next index) or None."""
        k = self.until(i, ";", "{", "(", "=", "[[")
        if self.text(k) != "[[" or self.text(self.near(k)) != "function_constant":
            return None
        words = [t[0] for t in self.tokens[i + 1 : k] if not is_blank(t[0])]
        kind, name = " ".join(words[:-1]), words[-1]
        opening = self.until(k, "(")
        closing = self.closing(opening, "(", ")")
        index = "".join(t[0] for t in self.tokens[opening + 1 : closing]).strip()
        self.unit.constants.append((kind, name, index))
        end = self.until(closing, "]]") + 1
        if self.mode == "cuda":
            value = self.values.get(name, 0)
            return f"static constexpr {kind} {name} = ({kind}){value}", end
        return f"static metal::msl_fc<{kind}> {name}", end

    def threadgroup_variable(self, i):
        """A threadgroup array in a body becomes a view of the runner's threadgroup memory."""
        line = self.tokens[i][1]
        end = self.until(i, ";")
        body = self.tokens[i + 1 : end]
        parts = [[t[0] for t in p if not is_blank(t[0])] for p in self.split(body)]
        first = parts[0]
        ends = [n for n, word in enumerate(first) if word in ("[", "=")] or [len(first)]
        cut = ends[0] - 1
        kind = " ".join(first[:cut])
        out = []
        for part in [first[cut:], *parts[1:]]:
            if "=" in part:
                self.refuse(line, "a threadgroup variable cannot have an initializer")
            name, dims = part[0], "".join(part[1:])
            self.unit.n_threadgroup_vars += 1
            n = self.unit.n_threadgroup_vars
            out.append(
                f"{kind} (&{name}){dims} = *({kind}(*){dims})"
                f'__msl_tg({n}, sizeof({kind}{dims}), alignof({kind}), "{name}")'
            )
        return "; ".join(out) + "\n" * "".join(t[0] for t in body).count("\n"), end

    def declares(self, i):
        """Whether `threadgroup` at i begins the declaration of a variable, not of a pointer."""
        if self.text(self.near(i, -1)) not in (";", "{", "}"):
            return False
        k = i
        while self.text(k) not in (";", "=", "[", "("):
            if self.text(k) in ("*", "&"):
                return False
            k += 1
        return True

    # ---- vectors: T(...) and (T)x

    def vector(self, i, out):
        """Rewrite a vector constructor or cast at `i`; returns the next index or None."""
        name = self.text(i)
        before, after = self.near(i, -1), self.near(i)
        prev, nxt = self.text(before), self.text(after)
        named = IDENT.match(prev) and prev not in ("return", "case", "else", "const")
        if nxt == "(" and not named and prev not in (">", "."):
            out.append(f"metal::mk<{name}>")
            return i + 1
        if prev == "(" and nxt == ")":
            operand = self.text(self.near(after))
            outer = self.text(self.near(before, -1))
            call = (IDENT.match(outer) and outer != "return") or outer in ("]", ">")
            if not call and re.match(r"[A-Za-z_0-9(.\-+~!*]", operand):
                while out and out[-1] != "(":
                    out.pop()
                out.pop()
                out.append(f"metal::castto<{name}>()->*")
                return after + 1
        return None

    def attribute(self, i, out):
        """`[[...]]`: kept out of the C++ text; returns (next index, max_threads or None)."""
        line = self.tokens[i][1]
        j = self.until(i, "]]")
        inner = "".join(t[0] for t in self.tokens[i + 1 : j]).strip()
        name = re.match(r"\w+", inner).group(0)
        if name not in ATTRIBUTES and name not in BUILTINS:
            self.refuse(line, f"unknown attribute [[{inner}]]")
        match = re.match(r"max_total_threads_per_threadgroup\s*\(\s*(\w+)", inner)
        out.append("\n" * "".join(t[0] for t in self.tokens[i:j]).count("\n"))
        return j + 1, match.group(1) if match else None

    # ---- the pass

    def run(self):
        out, i, braces, parens, max_threads = [], 0, 0, 0, None
        while i < len(self.tokens):
            t, line = self.tokens[i]
            if t.startswith("#") and not re.match(r"# \d", t):
                if self.mode == "cuda":  # a hint, for a GPU's compiler only
                    out.append(t)
                i += 1
                continue
            if is_blank(t):
                out.append(t)
                i += 1
                continue
            braces += (t == "{") - (t == "}")
            parens += (t == "(") - (t == ")")
            if t == "[[":
                i, found = self.attribute(i, out)
                max_threads = found or max_threads
                continue
            if t == "template" and "kernel" in (
                self.text(self.near(self.until(i, ">"))),
                self.text(self.near(i)),
            ):
                self.refuse(line, "kernel templates are outside the subset")
            if t == "kernel":
                self.kernel(i, max_threads)
                max_threads = None
            elif t == "constant" and braces == 0 and parens == 0:
                made = self.function_constant(i)
                if made:
                    out.append(made[0])
                    i = made[1]
                    continue
            elif t == "threadgroup" and braces > 0 and parens == 0 and self.declares(i):
                made, end = self.threadgroup_variable(i)
                if self.mode == "run":
                    out.append(made)
                    i = end
                else:
                    out.append("MSL_TG_VAR")
                    i += 1
                continue
            elif t in VECTORS:
                n = self.vector(i, out)
                if n is not None:
                    if out[-1].startswith("metal::castto"):
                        parens -= 1
                    i = n
                    continue
            elif FLOAT_LITERAL.match(t) and re.search(r"[.eE]", t):
                t += "f"  # MSL has no double: an unsuffixed literal is a float
            out.append(t)
            i += 1
        return "".join(out)


def rewrite(source, mode="run", values=None):
    """Return (C++ text, Unit). `values`: function constants by name, for mode "cuda"."""
    rewriter = Rewriter(source, mode, values)
    return rewriter.run(), rewriter.unit

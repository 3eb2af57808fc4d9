#!/usr/bin/env python3
"""Write an Objective-C Metal.h out of Apple's metal-cpp headers.

metal-cpp is the framework's published description in C++: per method an inline function that sends
one selector. From it come protocols, classes, structs, enums, constants and functions as Objective-C
names them. A message, type or struct that cannot be read is an error: nothing is left out but
the overloads that take a std::function (they have no selector of their own). Accessors come as
methods, not as @property; metal-cpp does not say which macOS a method came with.

    gen_metal_h.py METAL_CPP_FOLDER OUT
"""

import re
import sys
from pathlib import Path

HEAD = """/* Written by gen_metal_h.py from metal-cpp; do not edit. */
#ifndef GENERATED_METAL_H
#define GENERATED_METAL_H
#import <Foundation/Foundation.h>
#include <dispatch/dispatch.h>
#include <mach/mach.h>
#include <stdint.h>
"""
# Types of other frameworks that Metal's declarations name.
FOREIGN = {
    "CFTimeInterval": "typedef double CFTimeInterval;",
    "IOSurfaceRef": "typedef struct __IOSurface *IOSurfaceRef;",
    "NSTimeInterval": "typedef double NSTimeInterval;",
    "NSErrorDomain": "typedef NSString *NSErrorDomain;",
    "NSErrorUserInfoKey": "typedef NSString *NSErrorUserInfoKey;",
    "NSRange": "typedef struct _NSRange { NSUInteger location; NSUInteger length; } NSRange;",
    "CGSize": "typedef struct CGSize { double width; double height; } CGSize;",
}
C_TYPES = set(
    """void float double char int size_t uint8_t uint16_t uint32_t uint64_t int8_t int16_t
    int32_t int64_t kern_return_t task_id_token_t dispatch_queue_t dispatch_data_t NSUInteger
    NSInteger BOOL""".split()
)
C_NAMES = {"bool": "BOOL", "NS::UInteger": "NSUInteger", "NS::Integer": "NSInteger"}
NAMED = re.compile(r"(const )?((?:\w+::)*\w+)((?: ?(?:\*|const))*)$")
BLOCK = re.compile(r"(.*?)\(\^ ?(\w*)\) ?\((.*)\)$")
METHOD = re.compile(r"(?ms)^_MTL_INLINE ([^\n{;]+?)\s*(MTL4?)::(\w+)::\w+\(([^\n]*)\)(?: const)?"
                    r"\n\{\n(.*?)\n\}")  # fmt: skip
SENT = re.compile(
    r"\s*(?:return )?(?:NS::)?Object::sendMessage(?:Safe)?<[^()]*>"
    r"\((this|_MTL_PRIVATE_CLS\(\w+\)), _MTL_PRIVATE_SEL\((\w+)\)((?:, \w+)*)\);"
)


class Unreadable(Exception):
    """Something of metal-cpp that this reader does not know."""


def split(text):
    """A parameter list at its outer commas."""
    out, depth = [""], 0
    for ch in text:
        depth += (ch in "(<") - (ch in ")>")
        if ch == "," and depth == 0:
            out.append("")
        else:
            out[-1] += ch
    return [p.strip() for p in out if p.strip()]


class Reader:
    def __init__(self, folder):
        bridge = "".join((folder / f"MTL{n}.hpp").read_text() for n in ("HeaderBridge", "Private"))
        self.selectors = dict(re.findall(r'_MTL_PRIVATE_DEF_SEL\(\s*(\w+)\s*,\s*"([^"]+)"', bridge))
        self.classes = set(re.findall(r"_MTL_PRIVATE_DEF_CLS\((\w+)\)", bridge))
        self.protocols = set(re.findall(r"_MTL_PRIVATE_DEF_PRO\((\w+)\)", bridge))
        own = re.compile("HeaderBridge|Private|Defines|Version")  # macros, not declarations
        files = [p for p in sorted(folder.glob("MTL*.hpp")) if not own.search(p.name)]
        text = "".join(re.sub(r"//.*|\[\[.*?\]\]", "", p.read_text()) for p in files)
        self.text = text.replace("std::", "")
        self.foreign, self.plain = set(), set(C_TYPES)
        spaces = re.findall(r"^namespace (MTL4?)\s*\{(.*?)^\} *$", self.text, re.S | re.M)
        self.structs, self.enums, self.aliases, self.parents, self.consts = {}, {}, {}, {}, {}
        for ns, body in spaces:
            self.read_space(ns, body)
        self.plain |= self.structs.keys() | self.enums.keys() | self.aliases.keys()
        self.protocols |= self.parents.keys() - self.classes  # MTLCaptureScope

    def read_space(self, ns, body):
        for name, base in re.findall(r"^class (\w+) : public ([^\n]*)", body, re.M):
            args = split(re.sub(r"^[\w:]+<(.*)>$", r"\1", base))
            self.parents[ns + name] = (ns, args[1] if len(args) > 1 else None)
        for name, rest in re.findall(r"(?ms)^ *struct (\w+)\s*\{(.*?)^\} _MTL_PACKED;", body):
            self.structs[ns + name] = (ns, rest)
        enum = r"(?ms)^_MTL_(?:ENUM|OPTIONS)\(([\w:]+), (\w+)\) \{(.*?)\};"
        for base, name, rest in re.findall(enum, body):
            self.enums[ns + name] = (ns, base, rest)
        for name, what in re.findall(r"^ *using (\w+) ?= ?([^;]+);", body, re.M):
            if not what.startswith("function<"):
                self.aliases[ns + name] = (ns, what)
        for kind, name in re.findall(r"^_MTL_CONST\(([\w:]+), (\w+)\);", body, re.M):
            self.consts[ns + name] = (ns, kind)

    # ---- types

    def resolve(self, ns, name):
        """The C name of a C++ one, looked up in namespace `ns` first."""
        name = C_NAMES.get(name, name)
        if "::" in name:
            return name.replace("MTL::", "MTL").replace("MTL4::", "MTL4").replace("NS::", "NS")
        known = self.plain | self.classes | self.protocols
        return next((n for n in (ns + name, "MTL" + name) if n in known), name)

    def type(self, ns, text):
        """One C++ type in Objective-C; const is dropped where an object is meant."""
        text = re.sub(r"\b(class|struct|enum) ", "", " ".join(text.split())).replace("* *", "**")
        block = BLOCK.match(text)
        if block:
            result = self.type(ns, re.sub(r"^const ", "", block[1]))
            params = ", ".join(self.param(ns, p)[0] for p in split(block[3])) or "void"
            return f"{result} (^)({params})"
        found = NAMED.match(text)
        if not found:
            raise Unreadable(text)
        const, name, stars = found[1] or "", self.resolve(ns, found[2]), found[3].replace(" ", "")
        if name in self.protocols or name == "NSObject":
            stars = stars.replace("const", "")
            if not stars:
                raise Unreadable(f"{text}: an object by value")
            name = "id" if name == "NSObject" else f"id<{name}>"
            const = "const " if const and len(stars) > 1 else ""
            return f"{const}{name} {stars[1:]}".strip()
        if name in FOREIGN:
            self.foreign.add(name)
        elif name not in self.plain:
            if not stars or not (name in self.classes or name.startswith("NS")):
                raise Unreadable(f"{text}: {name} in {ns}")
            const, stars = "", stars.replace("const", "")
            if not name.startswith("MTL"):
                self.foreign.add("@" + name)
        return f"{const}{name} {stars.replace('const', ' const ')}".strip()

    def param(self, ns, text):
        """(type, name) of a parameter; an array becomes a pointer."""
        block = BLOCK.match(text)
        if block:
            return self.type(ns, text), block[2]
        array = re.match(r"(.*?)(\w+)\[\]$", text)
        if array:
            return self.type(ns, array[1].strip().replace("* const", "* ") + "*"), array[2]
        whole = re.match(r"(.*[\s*])(\w+)$", text)
        if whole and whole[1].strip() != "const" and whole[2] != "const":
            return self.type(ns, whole[1].strip()), whole[2]
        return self.type(ns, text), ""

    # ---- declarations

    def methods(self):
        """{class: {declaration: None}}, each line an Objective-C method."""
        out, read = {}, 0
        for kind, ns, cls, params, body in METHOD.findall(self.text):
            if "_MTL_PRIVATE_SEL" not in body:
                continue
            sent = SENT.match(body)
            if not sent or sent[2] not in self.selectors:
                raise Unreadable(body)
            read += 1
            selector, given = self.selectors[sent[2]], [self.param(ns, p) for p in split(params)]
            names, words = [n for _, n in given], selector.split(":")
            if sent[3].split(", ")[1:] != names or len(words) != len(names) + 1:
                raise Unreadable(f"{cls} {selector}: {params}")
            rest = " ".join(f"{w}:({t}){n}" for w, (t, n) in zip(words, given, strict=False))
            sign = "-" if sent[1] == "this" else "+"
            line = f"{sign} ({self.type(ns, kind)}){rest or selector};"
            out.setdefault(ns + cls, {})[line] = None
        if read != self.text.count("_MTL_PRIVATE_SEL("):
            raise Unreadable(f"{read} of {self.text.count('_MTL_PRIVATE_SEL(')} messages")
        return out

    def enum(self, name):
        ns, base, body = self.enums[name]
        items = re.sub(r"\b(?:MTL::)?([A-Z]\w*)\b(?!::)", ns + r"\1", body.replace("NS::", "NS"))
        items = items.replace(ns + "NS", "NS")
        return f"typedef enum : {self.type(ns, base)} {{{items}}} {name};"

    def struct(self, name):
        """Fields, and the functions MTLSizeMake and the like."""
        ns, body = self.structs[name]
        fields, made = [], []
        for line in (" ".join(x.split()) for x in body.split("\n")):
            field = re.match(r"([\w: *]+?) (\w+(?:\[\d+\])?);$", line)
            make = re.match(r"static [\w:]+ (\w+)\((.*)\);$", line)
            if field:
                fields.append(f"{self.type(ns, field[1])} {field[2]};")
            elif make:
                params = ", ".join(" ".join(self.param(ns, p)) for p in split(make[2]))
                made.append(f"{name} {name}{make[1]}({params or 'void'});")
            elif line in ("union", "struct", "{", "};"):
                fields.append(line)
            elif line and "(" not in line:
                raise Unreadable(f"{name}: {line}")
        return "\n".join([f"typedef struct {{ {' '.join(fields)} }} {name};", *made])

    def base(self, name):
        ns, parent = self.parents[name]
        parent = self.resolve(ns, parent or "NS::Object")
        return parent if parent in self.parents else "NSObject"

    def header(self):
        methods, done, types, objects = self.methods(), set(), [], []

        def need(name):  # a struct after the structs and aliases that it names
            if name in done or name not in self.structs.keys() | self.aliases.keys():
                return
            done.add(name)
            ns, body = (self.structs.get(name) or self.aliases[name])[:2]
            for word in re.findall(r"(?:\w+::)?\w+", body):
                need(self.resolve(ns, word))
            if name in self.structs:
                types.append(self.struct(name))
            else:
                kind = self.type(ns, body)
                whole = kind.replace("(^)", f"(^{name})", 1) if "(^)" in kind else f"{kind} {name}"
                types.append(f"typedef {whole};")

        def write(name):  # a class after its parent
            if name in done or name not in self.parents:
                return
            done.add(name)
            base = self.base(name)
            write(base)
            start = f"NSObject <{base}>" if base in self.protocols else base
            start = f"@interface {name} : {start}"
            if name in self.protocols:
                start = f"@protocol {name} <{base}>"
            objects.append("\n".join([start, *methods.pop(name, ()), "@end"]))

        for name in [*self.aliases, *self.structs]:
            need(name)
        for name in self.parents:
            write(name)
        if methods:
            raise Unreadable(f"methods of {sorted(methods)}")
        functions = []
        plain = r'(?m)^extern "C" (.*?) *\b(\w+)\((.*)\);'
        for kind, name, params in re.findall(plain, self.text):
            given = ", ".join(" ".join(self.param("MTL", p)) for p in split(params))
            functions.append(f"{self.type('MTL', kind)} {name}({given or 'void'});")
        values = [f"extern {self.type(*c)} const {n};" for n, c in self.consts.items()]
        ahead = [f"@class {n.lstrip('@')};" for n in sorted(self.foreign) if n.startswith("@")]
        ahead += [FOREIGN[n] for n in sorted(self.foreign) if not n.startswith("@")]
        ahead += [f"@class {', '.join(sorted(self.classes))};"]
        ahead += [f"@protocol {', '.join(sorted(self.protocols))};"]
        enums = [self.enum(n) for n in self.enums]
        parts = [HEAD, *ahead, *enums, *types, *values, *objects, *functions, "#endif"]
        return "\n".join(parts) + "\n"


def generate(metal_cpp):
    """Text of the header, from the folder that holds Metal/ and Foundation/."""
    return Reader(Path(metal_cpp) / "Metal").header()


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(generate(sys.argv[1]))

"""What a compiled library was built from, as csrc/about.h has it; and the digest of the ops, by
which native.py knows a library that was built for others. Imports no torch: setup.py and
tools/hub.py run this file by itself.
"""

import ast
import hashlib
import re
from pathlib import Path

DEFINITIONS = """\
#include "about.h"

const char* const lion::about::version = "{version}";
const char* const lion::about::cuda_archs = "{cuda_archs}";
const char* const lion::about::schemas_digest = "{digest}";
"""


def digest_of(schemas: dict[str, str]) -> str:
    """Of schemas by the names of their ops."""
    lines = "\n".join(name + schema for name, schema in schemas.items())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def schemas_in(source: str) -> dict[str, str]:
    """What Python source declares by ``@op(schema)``; it is read and not run."""
    return {
        node.name: ast.literal_eval(decorator.args[0])
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "op"
    }


def definitions(package: Path, cuda_archs: str) -> str:
    """The text of about.cpp, for a library of the package in this folder."""
    version = re.search('= "(.+)"', (package / "_version.py").read_text())
    assert version is not None
    digest = digest_of(schemas_in((package / "ops.py").read_text()))
    return DEFINITIONS.format(version=version[1], cuda_archs=cuda_archs, digest=digest)

"""The pack's files use no syntax and no standard library names newer than the oldest Python that pyproject.toml allows.

Tools and tests run on a later Python.
"""

import ast
import re
import subprocess
import sys
import tomllib

import comfyui
import pytest

PROJECT = tomllib.loads((comfyui.ROOT / "pyproject.toml").read_text())
OLDEST = "3.10"  # the oldest that ComfyUI runs on
PARTS = ("__init__.py", "nodes", "iec_core")
FILES = [path for part in PARTS for path in [comfyui.ROOT / part, *(comfyui.ROOT / part).rglob("*.py")] if path.suffix == ".py"]

# Additions of Python 3.11 to 3.14, from "What's New" of each.
MODULES = {
    "annotationlib",
    "compression",
    "concurrent.interpreters",
    "pathlib.types",
    "string.templatelib",
    "tomllib",
    "wsgiref.types",
}
NAMES = {
    "asyncio": {"Barrier", "QueueShutDown", "Runner", "TaskGroup", "eager_task_factory", "timeout", "timeout_at"},
    "builtins": {"BaseExceptionGroup", "ExceptionGroup", "PythonFinalizationError"},
    "calendar": {"Day", "Month"},
    "collections.abc": {"Buffer"},
    "contextlib": {"chdir"},
    "copy": {"replace"},
    "datetime": {"UTC"},
    "enum": {"EnumCheck", "EnumType", "ReprEnum", "StrEnum", "global_enum", "member", "nonmember", "property", "verify"},
    "functools": {"Placeholder"},
    "hashlib": {"file_digest"},
    "inspect": {"BufferFlags", "getasyncgenlocals", "getasyncgenstate", "getmembers_static", "ispackage"},
    "itertools": {"batched"},
    "locale": {"getencoding"},
    "logging": {"getHandlerByName", "getHandlerNames", "getLevelNamesMapping"},
    "math": {"cbrt", "exp2", "fma", "sumprod"},
    "operator": {"call", "is_none", "is_not_none"},
    "os": {"listdrives", "listmounts", "listvolumes", "process_cpu_count", "setns", "unshare"},
    "os.path": {"isdevdrive", "isjunction", "isreserved", "splitroot"},
    "random": {"binomialvariate"},
    "re": {"NOFLAG", "PatternError"},
    "sys": {"exception", "monitoring"},
    "threading": {"setprofile_all_threads", "settrace_all_threads"},
    "types": {"CapsuleType", "get_original_bases"},
    "typing": {
        "LiteralString", "Never", "NoDefault", "NotRequired", "ReadOnly", "Required", "Self", "TypeAliasType", "TypeIs",
        "TypeVarTuple", "Unpack", "assert_never", "assert_type", "get_overloads", "override", "reveal_type",
    },
    "uuid": {"uuid6", "uuid7", "uuid8"},
    "warnings": {"deprecated"},
}  # fmt: skip
METHODS = {"add_note"}  # of objects whose class is not visible in a file


def newer_syntax(path):
    """Return the linter's messages for syntax newer than the oldest Python; ast.parse(feature_version=...) accepts most
    of it.
    """
    version = f"py{OLDEST.replace('.', '')}"
    command = [
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--target-version",
        version,
        "--select",
        "E9",
        "--output-format",
    ]
    done = subprocess.run([sys.executable, *command, "concise", str(path)], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "invalid-syntax" in line]


def newer_names(source):
    """Return imports, or names read from an imported module, that the oldest Python's library lacks."""
    tree = ast.parse(source)
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules = {one.asname or one.name.split(".")[0]: one.asname and one.name for node in imported for one in node.names}
    found = {one.name for node in imported for one in node.names if one.name in MODULES}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = {one.name for one in node.names}
            found |= {node.module} & MODULES | {f"{node.module}.{name}" for name in names & NAMES.get(node.module, set())}
            modules |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node.value).split(".")
            owner = ".".join([modules.get(first) or first, *rest])
            if node.attr in METHODS or (first in modules and node.attr in NAMES.get(owner, ())):
                found.add(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Name) and node.id in NAMES["builtins"]:
            found.add(node.id)
    return found


def test_the_oldest_python_is_the_one_that_is_declared():
    assert PROJECT["project"]["requires-python"] == f">={OLDEST}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{OLDEST.replace('.', '')}"


def test_no_file_has_newer_syntax():
    assert [sentence for part in PARTS for sentence in newer_syntax(comfyui.ROOT / part)] == []


def test_no_file_has_newer_names():
    assert len(FILES) > 60
    assert {path.name: names for path in FILES if (names := newer_names(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "a[:, *b]",
        "try:\n    a\nexcept* ValueError:\n    b",
        "def f(*args: *a): pass",
        "type A = int",
        "def f[T](a): pass",
        "f'{a['b']}'",
    ],
)
def test_newer_syntax_is_found(tmp_path, source):
    (tmp_path / "a.py").write_text(source)
    assert newer_syntax(tmp_path / "a.py")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import tomllib", "tomllib"),
        ("from enum import Enum, StrEnum", "enum.StrEnum"),
        ("import datetime as d\nd.UTC", "datetime.UTC"),
        ("import os\nos.path.splitroot('')", "os.path.splitroot"),
        ("from os import path\npath.splitroot('')", "os.path.splitroot"),
        ("raise ExceptionGroup('', [])", "ExceptionGroup"),
        ("error.add_note('')", "error.add_note"),
    ],
)
def test_newer_names_are_found(source, name):
    assert newer_names(source) == {name}


def test_names_outside_the_standard_library_are_ignored():
    assert newer_names("from .enum import StrEnum\nimport torch\ntorch.override(a.member)\nzip(a, b)") == set()


def test_no_pattern_has_newer_syntax():
    """The test searches for possessive quantifiers and atomic groups, in any text."""
    texts = [
        node.value
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.")
        for node in node.args[:1]
        if isinstance(node, ast.Constant)
    ]
    assert texts and [text for text in texts if re.search(r"[*+?}]\+|\(\?>", text)] == []

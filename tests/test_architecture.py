"""What import contracts cannot say: which file may know which outside library, what stays out of which half of the
daemon, and that documents name what exists. Every rule is a function of source text, and is shown a breach."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "daemon" / "hibernode"
GENERATED = "_pb/"

# Package -> files of daemon/hibernode that may import it; a name with a slash at its end is a folder, "" is everywhere.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "alembic": ("api/migrate.py", "api/migrations/"),
    "blake3": ("transfer/format.py",),
    "boto3": ("drivers/s3.py",),
    "botocore": ("drivers/s3.py",),
    "click": ("cli.py", "cli/", "__main__.py"),
    "cryptography": ("drivers/keyring.py", "drivers/notary.py", "transfer/seal.py"),
    "cuda": ("drivers/gpu/cuda.py",),
    "fastapi": ("api/app.py", "api/openapi.py", "api/problems.py", "api/server.py"),
    "google": ("rpc.py", "wire.py", "drivers/criu.py", "cli.py", "cli/", GENERATED),
    "grpc": ("rpc.py", "cli.py", "cli/", "__main__.py", "drivers/workloads/cri.py", GENERATED),
    "grpc_health": ("rpc.py", "cli.py", "cli/"),
    "grpc_reflection": ("rpc.py",),
    "lz4": ("transfer/codec.py",),
    "mypy_boto3_s3": ("drivers/s3.py",),  # types only
    "nats": ("drivers/nats.py",),
    "numpy": ("transfer/",),
    "prometheus_client": ("metrics.py", "api/metrics.py"),
    "pycriu": ("drivers/criu.py", "transfer/pagemap.py"),
    "pydantic": (
        "model.py",
        "config.py",
        "drivers/keyring.py",
        "journal.py",
        "preflight.py",
        "wire.py",
        "transfer/format.py",
        "api/control.py",
        "api/schema.py",
    ),
    "pydantic_core": ("wire.py", "api/bulk.py"),
    "pynvml": ("drivers/gpu/nvml.py",),
    "rich": ("cli.py", "cli/", "__main__.py"),
    "sqlalchemy": ("api/bulk.py", "api/db.py", "api/migrate.py", "api/migrations/"),
    "starlette": ("api/problems.py",),
    "structlog": ("",),
    "typing_extensions": ("api/schema.py",),
    "uvicorn": ("api/server.py",),
    "xxhash": ("transfer/fingerprint.py",),
    "urllib3": ("drivers/kubernetes.py", "drivers/s3.py"),
    "zlib_ng": ("drivers/s3.py",),
    "zstandard": ("transfer/codec.py",),
}

# Files -> standard modules that have no business there: threads carry the bytes, the loop carries the commands.
MUST_NOT_IMPORT: dict[str, tuple[str, ...]] = {
    "transfer/": ("asyncio",),
    "flow.py": ("asyncio",),
    "dispatch.py": ("threading", "queue", "socket"),
}

PAGE_LINES = 100
PAGES = ("checkpoint.py", "restore.py")


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every absolute import, those inside functions and by literal name included."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield node.lineno, name.name
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module


def _within(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) or not place for place in places)


def import_breaches(path: str, source: str) -> list[str]:
    """`path` is relative to daemon/hibernode."""
    banned = {name for place, names in MUST_NOT_IMPORT.items() if _within(path, (place,)) for name in names}
    breaches = []
    for line, module in imported(source):
        top = module.partition(".")[0]
        if top in banned:
            breaches.append(f"{path}:{line} imports {module}, which has no business there")
        elif top in sys.stdlib_module_names or top == "hibernode":
            continue
        elif top not in MAY_IMPORT:
            breaches.append(f"{path}:{line} imports {module}, a package that nobody placed in MAY_IMPORT")
        elif not _within(path, MAY_IMPORT[top]):
            breaches.append(f"{path}:{line} imports {module}, which only {', '.join(MAY_IMPORT[top])} may")
    return breaches


def page_breaches(path: str, source: str) -> list[str]:
    """One page tells the story: a longer one has details that belong behind a name."""
    lines = len(source.splitlines())
    return [f"{path} has {lines} lines, more than {PAGE_LINES}"] if path in PAGES and lines > PAGE_LINES else []


_NAMED = re.compile(r"(?<![\w/.-])((?:daemon/hibernode|scripts|tests|benchmarks|proto|systemd)/[\w./-]*\w)(?![\w*{<])")


def doc_breaches(path: str, text: str) -> list[str]:
    """Files that a document names and that are not there."""
    return [f"{path} names {name}, which does not exist" for name in _NAMED.findall(text) if not (ROOT / name).exists()]


# In pieces, or this file would be its own first breach.
_UNWANTED = tuple(
    "".join(pieces)
    for pieces in (
        ("py", "pi.org"),
        ("python", "hosted.org"),
        ("deb.", "debian.org"),
        ("security.", "debian.org"),
        ("registry.", "npmjs.org"),
        ("crates", ".io/"),
        ("proxy.", "golang.org"),
        ("repo1.", "maven.org"),
        ("repo.maven.", "apache.org"),
        ("..", "/shared/"),
        ("/work", "/main"),
    )
)


def address_breaches(path: str, text: str) -> list[str]:
    """The project names no registry's host and no place of the machine it was written on: it must build anywhere."""
    return [f"{path} names {address}" for address in _UNWANTED if address in text]


def _none(breaches: Iterator[str]) -> None:
    found = list(breaches)
    assert not found, "\n".join(["", *found])


def _sources() -> Iterator[tuple[str, str]]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert found, f"no sources in {PACKAGE}"
    return ((file.relative_to(PACKAGE).as_posix(), file.read_text()) for file in found)


def _tracked() -> Iterator[tuple[str, str]]:
    """Every text file that is in the repository, or would be."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout  # fmt: skip
    names = [name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]
    assert "pyproject.toml" in names
    for name in names:
        yield name, (ROOT / name).read_bytes().decode(errors="replace")


def test_each_library_and_each_thread_or_loop_module_stays_where_it_belongs() -> None:
    _none(breach for path, source in _sources() for breach in import_breaches(path, source))


def test_every_place_named_in_the_rules_could_exist() -> None:
    """A file that was renamed would leave its rule behind, allowing nothing and guarding nothing."""
    alternatives = {"cli.py", "cli/"}
    places = {place for places in MAY_IMPORT.values() for place in places} | set(MUST_NOT_IMPORT) | set(PAGES)
    assert [place for place in sorted(places - alternatives) if not (PACKAGE / place).exists()] == []
    assert any((PACKAGE / place).exists() for place in alternatives)


def test_checkpoint_and_restore_are_a_page_each() -> None:
    _none(breach for path, source in _sources() for breach in page_breaches(path, source))


def test_documents_name_files_that_exist() -> None:
    documents = [file for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if file.exists()]
    named = ((file.relative_to(ROOT).as_posix(), file.read_text()) for file in documents)
    _none(breach for path, text in named for breach in doc_breaches(path, text))


def test_no_registry_and_no_place_of_one_machine_is_named() -> None:
    _none(breach for path, text in _tracked() for breach in address_breaches(path, text))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("drivers/localdir.py", "import boto3"),
        ("drivers/localdir.py", "from botocore.config import Config"),
        ("dispatch.py", "def later():\n    import nats.js"),
        ("wire.py", "import importlib\nimportlib.import_module('pycriu.images')"),
        ("metrics.py", "import grpc"),
        ("transfer/send.py", "import zstandard as z"),
        ("transfer/codec.py", "from blake3 import blake3"),
        ("model.py", "import os, numpy.typing"),
        ("rpc.py", "import prometheus_client"),
        ("doctor.py", "def looked():\n    import pynvml"),
        ("checkpoint.py", "import rich"),
        ("dispatch.py", "import click"),
        ("rpc.py", "import requests"),
        ("drivers/gpu/nvml.py", "from cuda.bindings import driver"),
        ("service.py", "def probe():\n    import cuda.bindings.driver"),
        ("transfer/serve.py", "import asyncio"),
        ("flow.py", "from asyncio import Queue"),
        ("dispatch.py", "import threading"),
        ("dispatch.py", "from queue import Queue"),
        ("dispatch.py", "import socket"),
    ],
)
def test_a_seeded_import_is_seen(path: str, source: str) -> None:
    assert len(import_breaches(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("drivers/s3.py", "import boto3\nfrom botocore.config import Config"),
        ("drivers/nats.py", "import nats"),
        ("__main__.py", "import asyncio\nfrom hibernode.drivers import nats, s3"),
        ("_pb/hibernode_pb2_grpc.py", "import grpc\nfrom google.protobuf import message"),
        ("transfer/format.py", "import numpy as np\nfrom blake3 import blake3\nfrom . import pageproto"),
        ("rpc.py", "import threading, structlog"),
    ],
)
def test_an_import_in_its_place_is_no_breach(path: str, source: str) -> None:
    assert import_breaches(path, source) == []


def test_a_seeded_long_page_missing_file_and_address_are_seen() -> None:
    assert page_breaches("restore.py", "pass\n" * (PAGE_LINES + 1))
    assert not page_breaches("restore.py", "pass\n" * PAGE_LINES)
    assert not page_breaches("rpc.py", "pass\n" * (PAGE_LINES + 1))
    assert doc_breaches("docs/x.md", "see `daemon/hibernode/utils.py`, and scripts/setup.") == [
        "docs/x.md names daemon/hibernode/utils.py, which does not exist"
    ]
    assert len(doc_breaches("docs/x.md", "`scripts/nothing` [tests](tests/nowhere.py)")) == 2
    assert address_breaches("requirements/x.txt", "--index-url https://" + "py" + "pi.org/simple")

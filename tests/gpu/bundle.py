"""`scripts/gpu-bundle`: one folder that holds all that `gpu-verify` needs on a machine with a GPU, a Python, and nothing else.

What lies in it: `run`; our own code as it is; `parts.tar.gz`, which `run` unpacks into a folder of its own: the packages that a node needs,
pruned, and CRIU with its libraries. Compiled modules have their Python's name, so those of several versions lie side by side.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LIMIT = 60 << 20  # bytes
# What `hibernode node` imports with a local store and without a bus, and what a GPU needs.
PACKAGES = (
    "annotated-types", "blake3", "cffi", "cryptography", "cuda-bindings", "cuda-pathfinder", "grpcio", "grpcio-health-checking",
    "grpcio-reflection", "numpy", "nvidia-ml-py", "prometheus-client", "protobuf", "pydantic", "pydantic-core", "structlog",
    "typing-extensions", "typing-inspection", "zstandard",
)  # fmt: skip
# Of ours; api/ is the control plane, cli/ has packages of its own.
CODE = (
    "daemon/hibernode", "tests/gpu", "tests/fakes/cuda", "tests/node/programs/cuda_job.py", "tests/cuda_controller.py", "tests/daemon.py",
    "tests/keeper.py", "LICENSE",
)  # fmt: skip
_NOT_OURS = re.compile(r"daemon/hibernode/(api|cli)/|/__pycache__/|tests/gpu/bundle\.py$")
_PRUNED = re.compile(
    r"""(^|/)(tests|__pycache__)/ | \.(pyc|pyi|pyx|pxd|h|hpp|a|typed|c|lib)$ | \.dist-info/ | ^\.\. | ^bin/
    | ^numpy/(f2py|_core/_simd\.|_core/include|random/_examples) | ^zstandard/_cffi\.
    | ^cuda/bindings/(_v2|_test_helpers)/ | ^cuda/bindings/(cy)?(nv|runtime|cudla|cufile)[a-z]*\.
    | ^cuda/bindings/_internal/(cy)?(nv|cudla|cufile)[a-z0-9_]*\. | ^cffi/ | ^pydantic/(v1|_migration_data)/""",
    re.VERBOSE,
)
_STRIPPED = re.compile(
    r"^zstandard/.*\.so$"
)  # 12 MB of debug symbols; what auditwheel has mended, such as numpy's, strip would break
_PLATFORMS = ("manylinux2014", *(f"manylinux_2_{minor}" for minor in (17, 24, 26, 27, 28, 31, 34)))


class Failed(Exception):
    """The text says what, and a hint what to do."""


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    try:
        size = build(arguments.dest, arguments.python or [_version()])
    except Failed as e:
        sys.stderr.write(f"gpu-bundle: {e}\n")
        return 1
    pythons = " or ".join(arguments.python or [_version()])
    sys.stdout.write(
        f"gpu-bundle: {arguments.dest}: {size / (1 << 20):.1f} MiB, for Python {pythons} on x86-64; start {arguments.dest}/run\n"
    )
    return 0


def build(destination: Path, pythons: Sequence[str], limit: int = LIMIT) -> int:
    """Its bytes. `destination` must not exist; after a failure it does not."""
    if destination.exists():
        raise Failed(f"{destination} is there already\nhint: remove it, or name another")
    draft = destination.with_name(f"{destination.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        _put_code(draft)
        with tempfile.TemporaryDirectory() as work:
            parts = Path(work) / "parts"
            _put_packages(parts / "site", pythons, Path(work))
            _put_criu(parts / "criu")
            with tarfile.open(draft / "parts.tar.gz", "w:gz", compresslevel=6) as tar:
                tar.add(parts, ".", filter=_root_owned)
        for name, source in {"run": "bundle-run", "unpack.py": "unpack.py"}.items():
            shutil.copy(HERE / source, draft / name)
        (draft / "run").chmod(0o755)
        versions = {name: metadata.version(name) for name in PACKAGES}
        facts = {
            "pythons": list(pythons),
            "machine": "x86_64",
            "packages": versions,
            "criu": (_criu() / "VERSION").read_text().strip(),
        }
        (draft / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n")
        size = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
        if size > limit:
            raise Failed(f"{size / (1 << 20):.1f} MiB, more than {limit / (1 << 20):.0f}\nhint: fewer --python, or prune more")
        draft.rename(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return size


def _put_code(draft: Path) -> None:
    for name in CODE:
        source = ROOT / name
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            inside = path.relative_to(ROOT)
            if path.is_file() and not _NOT_OURS.search(str(inside)) and path.suffix != ".pyc":
                _copy(path, draft / inside)
    # a `tests` of the machine's own must not come first: a folder with this file does, one without does not
    for place in {path.parent for path in (draft / "tests").rglob("*.py")} | {
        draft / "tests",
        draft / "tests/fakes",
        draft / "tests/node",
    }:
        (place / "__init__.py").touch()


def _put_packages(site: Path, pythons: Sequence[str], work: Path) -> None:
    for name, path in _installed():
        _copy(path, site / name)
    if _version() not in pythons:
        for path in site.rglob(f"*.cpython-{_version().replace('.', '')}-*.so"):
            path.unlink()
    for version in pythons:
        if version != _version():
            for wheel in _wheels(version, work / f"wheels-{version}"):
                with zipfile.ZipFile(wheel) as packed:
                    for name in packed.namelist():
                        if ".so" in Path(name).name and not _PRUNED.search(name) and not (site / name).exists():
                            packed.extract(name, site)
    for path in [path for path in site.rglob("*.so") if _STRIPPED.search(str(path.relative_to(site)))]:
        with_strip = shutil.which("strip")
        if with_strip:
            subprocess.run([with_strip, "--strip-debug", str(path)], check=True)
    for name in ("cuda", "google"):  # as with `tests`
        (site / name / "__init__.py").touch()


def _installed() -> Iterator[tuple[str, Path]]:
    """Files of this environment's packages, pruned: names inside site-packages, and where they are."""
    for package in PACKAGES:
        files = metadata.files(package)
        if files is None:
            raise Failed(f"nobody knows which files {package} has\nhint: scripts/setup --dev")
        for file in files:
            if not _PRUNED.search(str(file)) and (path := Path(str(file.locate()))).is_file():
                yield str(file), path


def _wheels(version: str, place: Path) -> list[Path]:
    """Of the same packages, in the same versions, for another Python, with the hashes of our lock. Needs a package index."""
    text = (ROOT / "requirements/dev.txt").read_text()
    wanted = []
    for package in PACKAGES:
        entry = re.search(rf"^{package}==(?:.*\\\n)+.*$", text, re.MULTILINE)
        if entry is None:
            raise Failed(f"requirements/dev.txt has no {package}")
        wanted.append(re.sub(r"^\s*#.*$", "", entry[0], flags=re.MULTILINE))
    place.mkdir()
    (place / "wanted.txt").write_text("\n".join(wanted))
    platforms = [word for name in _PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps", "--only-binary=:all:"]
    argv += ["--require-hashes", "--implementation", "cp", "--python-version", version, *platforms, "-d", str(place)]
    done = subprocess.run([*argv, "-r", str(place / "wanted.txt")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"pip finds not all packages for Python {version}:\n{done.stderr[-1500:]}\nhint: it needs a package index")
    return sorted(place.glob("*.whl"))


def _criu() -> Path:
    found = ROOT / ".criu"
    if not (found / "lib").is_dir():
        raise Failed("there is no CRIU with libraries of its own here\nhint: scripts/criu-prefix .criu")
    return found


def _put_criu(place: Path) -> None:
    source = _criu()
    for path in (source / "python").rglob("*.py"):
        _copy(path, place / path.relative_to(source))
    for name in ("VERSION", "PACKAGES"):
        if (source / name).exists():
            _copy(source / name, place / name)
    _copy(source / "bin/criu", place / "bin/criu")
    for name in _needed(source / "bin/criu", source / "lib"):
        _copy(source / "lib" / name, place / "lib" / name)


def _needed(program: Path, libraries: Path) -> set[str]:
    """Names of the libraries that it needs, and that these need. What is loaded by name only (libnss) it does without."""
    found, queue = {"ld-linux-x86-64.so.2"}, [program]
    while queue:
        done = subprocess.run(["readelf", "-d", str(queue.pop())], capture_output=True, text=True, check=True)
        new = set(re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)) - found
        found |= new
        queue += [libraries / name for name in new]
    return found


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(stat.S_IMODE(source.stat().st_mode) & 0o755)


def _root_owned(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _version() -> str:
    return sysconfig.get_python_version()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gpu-bundle", description=str(__doc__).split(":", 1)[1].strip().split("\n")[0])
    parser.add_argument("dest", type=Path, metavar="DEST", help="a folder that is not there yet")
    parser.add_argument(
        "--python",
        action="append",
        metavar="3.12",
        type=_minor,
        help=f"carry compiled packages for that version, again for another; else {_version()}. What is not here is downloaded",
    )
    return parser


def _minor(word: str) -> str:
    if not re.fullmatch(r"3\.1[1-9]", word):
        raise argparse.ArgumentTypeError(f"{word}: 3.11 or newer, as 3.12")
    return word


if __name__ == "__main__":
    sys.exit(main())

"""The configuration: defaults, then one TOML file, then `HIBERNODE_*` variables; frozen after `load`.

A key nobody knows or a value out of range is a refusal to start: a daemon that freezes other people's processes does not guess.
`HIBERNODE_STORE__URL` sets `url` in `[store]`: two underscores for a level.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, StringConstraints, ValidationError, model_validator

from hibernode.errors import Refused

Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$", max_length=128)]  # one token of a NATS subject
MIB = 1 << 20


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Bus(Section):
    """The event stream. An empty url: no bus, gRPC only."""

    url: str = ""
    credentials: str = ""  # path of a NATS .creds file
    user: str = ""
    password: SecretStr = SecretStr("")
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    events_max_age: float = Field(default=7 * 86400.0, gt=0)  # seconds the events are kept
    max_deliver: int = Field(default=5, ge=1)
    ack_wait: float = Field(default=30.0, ge=1)  # seconds without a sign of life until a command is given out again
    replicas: int = Field(default=1, ge=1, le=5)
    make_streams: bool = True  # False: the control plane makes them, and this node's login may not


class S3(Section):
    """Empty values leave the choice to the SDK's own chain (environment, profile, instance role)."""

    endpoint_url: str = ""
    region: str = ""
    access_key_id: str = ""
    secret_access_key: SecretStr = SecretStr("")
    profile: str = ""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    part_size: ByteSize = Field(default=ByteSize(8 * MIB), ge=5 * MIB, le=5 << 30)
    parts_in_flight: int = Field(default=2, ge=1, le=64)  # per stream
    reads_in_flight: int = Field(default=2, ge=1, le=64)  # per stream of a restore
    connect_timeout: float = Field(default=10.0, gt=0)
    read_timeout: float = Field(default=60.0, gt=0)
    attempts: int = Field(default=5, ge=1)


class Store(Section):
    url: str = "file:///var/lib/hibernode/store"  # or s3://bucket/prefix
    allowed: tuple[str, ...] = ()  # further stores that a command's `directory` may name, or anything under them
    s3: S3 = S3()


class Arena(Section):
    size: ByteSize = Field(default=ByteSize(512 * MIB), ge=16 * MIB)


class Transfer(Section):
    streams: int = Field(default=0, ge=0, le=64)  # 0: one per CPU, at most 8
    compression: Annotated[str, StringConstraints(pattern=r"^(none|lz4|zstd(:(-[1-7]|[0-9]|1[0-9]))?)$")] = "zstd"
    lazy_room: ByteSize = Field(default=ByteSize(256 * MIB), ge=16 * MIB)  # of memory, for what a lazy restore has read ahead


class Increments(Section):
    """Checkpoints that refer to pages of earlier ones."""

    bases: int = Field(
        default=8, ge=0, le=64
    )  # that one refers to at most; one more, and it is a full one. 0: heartbeats are full ones


class Criu(Section):
    path: str = ""  # empty: beside the interpreter, else PATH
    timeout: int = Field(default=120, ge=1)  # seconds CRIU gives a tree to stop
    log_level: int = Field(default=2, ge=0, le=4)
    tcp: Literal["refuse", "close", "established"] = "refuse"
    ghost_limit: ByteSize = Field(default=ByteSize(64 * MIB), ge=0, le=1 << 30)
    lazy: bool = True  # restores may be lazy, when a command says so
    filler: bool = True  # where it can, it brings the pages of restores that are not lazy, too; else CRIU reads them from files


class Limits(Section):
    """Deadlines are seconds; what is said "beside" is added for each action's own size, so that a default suits any workload."""

    actions: int = Field(default=2, ge=1)  # running at once on this node
    preflight: float = Field(default=120.0, gt=0)  # seconds to look at the workload, the node and the store
    pause: float = Field(default=60.0, gt=0)  # seconds a dump may hold a workload, beside 1 s for each 64 MiB of its memory
    transfer: float = Field(default=600.0, gt=0)  # seconds to ship or fetch an image, beside 1 s for each 4 MiB of its memory
    commit: float = Field(default=300.0, gt=0)  # seconds to write the manifest and to read it back
    gpu: float = Field(default=120.0, gt=0)  # seconds to save or bring back GPU state, beside 1 s for each 128 MiB of it
    restore: float = Field(default=120.0, gt=0)  # seconds CRIU has to restore, beside 1 s for each 64 MiB of memory
    outage: float = Field(default=120.0, ge=0)  # seconds a tree that a lazy restore fills waits for a store that does not answer
    second: Literal["wait", "refuse"] = "wait"  # what becomes of a command for a workload that has one at work
    attempts: int = Field(default=3, ge=1)  # of a command that meets a transient error before anything is frozen
    retry_delay: float = Field(default=5.0, ge=0)  # seconds before the next
    progress_interval: float = Field(default=0.25, gt=0)  # seconds
    node_interval: float = Field(default=10.0, gt=0)  # seconds between two node records; they live for three of them

    def pause_of(self, size: int) -> float:
        """Of a workload with `size` bytes of memory: a rate far below any store worth the name, for what the arena does not take."""
        return self.pause + size / (64 * MIB)

    def gpu_of(self, size: int) -> float:
        """Of `size` bytes of device memory: half a slow copy's rate (0.3 GB/s, gpu.md section 12)."""
        return self.gpu + size / (128 * MIB)

    def transfer_of(self, size: int) -> float:
        return self.transfer + size / (4 * MIB)

    def restore_of(self, size: int) -> float:
        return self.restore + size / (64 * MIB)


class Gpu(Section):
    """NVIDIA GPUs. A node without is as good as any."""

    nvml: str = ""  # path of libnvidia-ml.so.1; empty: where the system has it
    libcuda: str = ""  # path of libcuda.so.1; empty: what the loader finds, then the usual places
    lock_timeout: float = Field(default=10.0, gt=0)  # seconds until work on the GPU that does not end keeps it from being saved
    design: Literal["lock", "stop"] = "lock"  # "stop": the whole tree stands still while its GPU state is not where it was
    idle: float = Field(default=300.0, gt=0)  # seconds after which a helper that nobody needs ends: it keeps the driver loaded


class Containers(Section):
    """Of containerd, or of runc alone. A node without is as good as any."""

    cri: str = "unix:///run/containerd/containerd.sock"  # the container runtime's interface; nobody there, or empty: no pods
    socket: Path = Path("/run/hibernode/runtime.sock")  # where the OCI runtime in front of runc asks; only root can open it
    runc: str = "runc"  # the program; where it is not in PATH, its path
    roots: tuple[Path, ...] = (Path("/run/runc"), Path("/run/containerd/runc/k8s.io"))  # of runc's states, for containers by id


class Kubernetes(Section):
    """The API server, where this node is one of a cluster. Empty values: in a pod, its own cluster's; elsewhere none."""

    api_server: str = ""  # such as https://10.0.0.1:6443
    token_file: str = ""  # path of the token of a service account; read for each call
    ca_file: str = ""  # path of the CA of the API server, in PEM
    mounted: str = "/var/run/secrets/kubernetes.io/serviceaccount"  # in a pod: where its account's token and ca.crt are
    node_name: str = (
        ""  # of this node's Node object, which may have dots; empty: `node`. Where `node` is not set, it comes from here
    )
    timeout: float = Field(default=10.0, gt=0)  # seconds of silence, for each call
    prestop: Annotated[str, StringConstraints(pattern=r"^([0-9.]+:[0-9]{1,5})?$")] = (
        "127.0.0.1:9467"  # where preStop hooks of pods ask, in the machine's own network, if there is an API server; empty: nowhere
    )


class Signing(Section):
    """Of manifests, with ed25519. Files in PEM."""

    key: str = ""  # path of this node's private key; empty: nothing is signed
    trusted: tuple[str, ...] = ()  # paths of public keys; if there is one, a manifest signed by none of them is refused


class Encryption(Section):
    """Of everything but the manifest, with AES-256-GCM and a data key per checkpoint, which a key of ours wraps."""

    key: str = ""  # path of the 32 bytes (raw, hex or base64) that wrap data keys; empty: nothing is encrypted
    former: tuple[str, ...] = ()  # paths of keys that wrapped older checkpoints: for reading
    command: tuple[str, ...] = ()  # a program that wraps and unwraps in place of a file: a key management service


class Retention(Section):
    """What `hibernode gc` removes; nothing is removed that is younger than `grace`, or in use."""

    grace: float = Field(default=86400.0, ge=0)  # seconds
    keep_last: int = Field(default=0, ge=0)  # checkpoints of one workload that stay; 0: all
    keep_days: float = Field(default=0.0, ge=0)  # older ones go; 0: none


class Watchdog(Section):
    """The process that gives workloads back when the daemon cannot."""

    interval: float = Field(default=1.0, gt=0)  # seconds between two looks
    grace: float = Field(default=15.0, ge=0)  # seconds for a daemon to come back, and for a phase to end after its deadline


class Metrics(Section):
    listen: str = "127.0.0.1:9465"  # empty: none


class Heartbeat(Section):
    """A pod that the control plane checkpoints again and again: by UID, or by namespace and name."""

    pod_id: str = ""
    namespace: str = "default"
    pod_name: str = ""
    interval: float = Field(default=3600.0, ge=10)  # seconds from one to the next; skipped while one is at work
    keep_last: int = Field(default=0, ge=0)  # ready ones that stay; 0: all


class Api(Section):
    """The control plane, `hibernode api`. It needs a bus; a node does not read this."""

    listen: str = "127.0.0.1:9466"
    database: SecretStr = SecretStr(
        ""
    )  # sqlite:////path/to/file or postgresql://user:password@host/name; empty: SQLite in `state_dir`
    tls_cert: str = ""  # path of a certificate in PEM; empty: no TLS
    tls_key: str = ""
    auth: Literal["token", "none"] = "token"  # none: for a loopback address alone
    tokens: tuple[str, ...] = ()  # `name:sha256 of the token in hex`, beside those in the database
    shared_file_stores: bool = False  # a store at file:// is the same place on every node
    find_timeout: float = Field(default=1.0, gt=0)  # seconds nodes have to say that a pod is theirs
    silent_after: float = Field(default=120.0, gt=0)  # seconds without a word of its node until an action is `error`
    expires_after: float = Field(default=3600.0, gt=0)  # seconds a command waits for a node that is down
    body_limit: ByteSize = Field(default=ByteSize(MIB), ge=1024)
    rate: float = Field(default=100.0, gt=0)  # requests each second of one token (without: of one address), in the long run
    burst: int = Field(default=200, ge=1)  # at once
    heartbeats: tuple[Heartbeat, ...] = ()  # beside those in the database
    annotations: bool = True  # pods may ask by their annotations for heartbeats, and to go on elsewhere when they are evicted


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"  # auto: console on a terminal, else json


class Config(Section):
    node: Token = Field(default_factory=lambda: socket.gethostname().replace(".", "-"))
    cluster: Token = "default"
    state_dir: Path = Path("/var/lib/hibernode")  # journal, outbox, jobs
    work_dir: Path = Path("/dev/shm/hibernode")  # tmpfs: CRIU's small images, pages of a restore
    socket: Path = Path("/run/hibernode/hibernode.sock")
    bus: Bus = Bus()
    store: Store = Store()
    arena: Arena = Arena()
    transfer: Transfer = Transfer()
    increments: Increments = Increments()
    criu: Criu = Criu()
    gpu: Gpu = Gpu()
    containers: Containers = Containers()
    kubernetes: Kubernetes = Kubernetes()
    limits: Limits = Limits()
    signing: Signing = Signing()
    encryption: Encryption = Encryption()
    gc: Retention = Retention()
    watchdog: Watchdog = Watchdog()
    metrics: Metrics = Metrics()
    api: Api = Api()
    log: Log = Log()

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_node(cls, data: dict[str, Any]) -> dict[str, Any]:
        """In a pod the host name is the pod's, another one each time."""
        of = data.get("kubernetes")
        name = of.get("node_name") if isinstance(of, dict) else ""
        return {**data, "node": name.replace(".", "-")} if isinstance(name, str) and name and "node" not in data else data

    def criu_path(self) -> str:
        """The binary to use: as configured, else beside the interpreter (where `scripts/setup` puts it), else from PATH."""
        beside = Path(sys.executable).parent / "criu"
        return self.criu.path or (str(beside) if beside.exists() else "criu")


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration, or Refused("config") that names the key, what was found and what is allowed."""
    data: dict[str, object] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise Refused(
                "config",
                f"cannot read the configuration {path}: {e}",
                prop="file",
                found=str(path),
                wanted="readable TOML",
                hint="`hibernode check-config --defaults` prints one to start from",
            ) from e
    for name, value in environ.items():
        if name.startswith("HIBERNODE_") and not name.startswith("HIBERNODE_TEST_") and name not in _OUTSIDE:
            _set(data, name, name.removeprefix("HIBERNODE_").lower().split("__"), value)
    try:
        return Config.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise Refused(
            "config",
            f"configuration key {key}: {first['msg'].lower()}",
            prop=key,
            found=_shown(key, first.get("input")),
            wanted=first["msg"],
            hint="`hibernode check-config --defaults` prints every key with its default",
        ) from e


_OUTSIDE = {"HIBERNODE_CONFIG", "HIBERNODE_SOCKET_PATH"}  # read by the command line, not keys of the configuration
_LISTS = ("allowed", "trusted", "former", "command", "tokens")  # of a variable: with commas between
_SECRET = ("password", "secret", "token", "credentials")
_WITH_SECRETS = ("bus", "store.s3")  # tables that hold some


def _shown(key: str, value: object) -> object:
    """What was found, unless it may be, or hold, a secret: a wrong table, or a key with a typo, can hold one."""
    if isinstance(value, list | dict) or any(part in key for part in _SECRET):
        return "(hidden)"
    if isinstance(value, str):
        return "(hidden)" if key.startswith(_WITH_SECRETS) else without_secrets(value)
    return value


def without_secrets(text: str) -> str:
    """Addresses without the user and the password that may stand in them."""
    return re.sub(r"//[^/,\s]*@", "//(hidden)@", text)


def _set(data: dict[str, object], name: str, keys: list[str], value: str) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise Refused(
                "config", f"{name}: {key} is a value, not a table of the configuration", prop=".".join(keys), found=name,
                wanted="the name of a key", hint="`hibernode check-config --defaults` prints every key with its default",
            )  # fmt: skip
        data = inner
    data[keys[-1]] = value.split(",") if keys[-1] in _LISTS else value


def render(config: Config) -> str:
    """All values as TOML, secrets hidden."""
    lines: list[str] = []

    def table(section: BaseModel, path: str) -> None:
        inner = {k: v for k, v in section if isinstance(v, BaseModel)}
        if path:
            lines.append(f"\n[{path}]")
        lines.extend(f"{k} = {_toml(v if k != 'command' else _program(v))}" for k, v in section if k not in inner)
        for k, v in inner.items():
            table(v, f"{path}.{k}" if path else k)

    table(config, "")
    return "\n".join(lines) + "\n"


def _program(argv: tuple[str, ...]) -> tuple[str, ...]:
    """Its arguments may hold a secret."""
    return argv[:1] + ("(hidden)",) * len(argv[1:])


def _toml(value: object) -> str:
    if isinstance(value, SecretStr):
        return '"(hidden)"' if value.get_secret_value() else '""'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(int(value) if isinstance(value, int) else value)
    if isinstance(value, BaseModel):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(without_secrets(str(value)), ensure_ascii=False).replace("\x7f", "\\u007f")


@contextlib.contextmanager
def usable(prop: str, value: object) -> Iterator[None]:
    """What the system does not give us of what the configuration names is Refused("config"). But not for a full disk: that passes, and
    after a refusal nobody tries again."""
    try:
        yield
    except (OSError, OverflowError) as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Refused("config", f"{prop} {value} cannot be used: {e}", prop=prop, found=str(value), wanted="usable") from e

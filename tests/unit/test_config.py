"""The configuration: what is wrong keeps the daemon from starting and is named; secrets are never shown."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from hibernode import config
from hibernode.config import Config, load, render
from hibernode.errors import Refused

BAD: dict[str, list[object]] = {
    "node": ["", "a.b", "a b", "x" * 129, 7, "ä", "a*"],
    "cluster": ["", "a.b", ">"],
    "state_dir": [7, [], True],
    "surprise": [1],
    "bus": ["nats://localhost", 1],
    "bus.surprise": [1],
    "bus.url": [1, []],
    "bus.events_max_age": [0, -1, "soon", float("inf"), float("nan")],
    "bus.max_deliver": [0, -1, 1.5],
    "bus.ack_wait": [0, 0.5, "x"],
    "bus.replicas": [0, 6],
    "store.url": [1],
    "store.allowed": ["file:///a", 1, [1]],
    "store.s3.part_size": [1, "1MiB", "6GiB", -5, "much"],
    "store.s3.parts_in_flight": [0, 65],
    "store.s3.reads_in_flight": [0, 65],
    "store.s3.addressing": ["maybe", ""],
    "store.s3.attempts": [0],
    "store.s3.read_timeout": [0, -1],
    "arena.size": ["1MiB", 0, -1, "x"],
    "transfer.streams": [-1, 65, "many"],
    "transfer.compression": ["lz4:1", "lz5", "", "zstd:99", "zstd:-8", "zstd:x"],
    "criu.timeout": [0, -1],
    "criu.log_level": [-1, 5],
    "criu.tcp": ["drop", "", True],
    "criu.ghost_limit": [-1, "2GiB"],
    "limits.actions": [0, -1],
    "limits.attempts": [0],
    "limits.retry_delay": [-1, float("inf")],
    "limits.progress_interval": [0],
    "limits.node_interval": [0],
    "log.level": ["loud"],
    "log.format": ["xml"],
}


def toml(key: str, value: object) -> str:
    *table, name = key.split(".")
    text = f"[{'.'.join(table)}]\n" if table else ""
    return text + f"{name} = {config._toml(value) if not isinstance(value, list) else str(value)}\n"


def loaded(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> Config:
    (tmp_path / "hibernode.toml").write_text(text)
    return load(tmp_path / "hibernode.toml", environ or {})


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_with_its_key(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(Refused) as refused:
        loaded(tmp_path, toml(key, value))
    error = refused.value
    assert error.code == "config"
    assert str(error.details["property"]).startswith(key), error.details
    assert error.details["wanted"]
    assert error.hint
    assert key in error.message


ANY_TEXT = ("state_dir", "bus.url", "store.url", "store.allowed")  # in a variable everything is an address or a path
BAD_TEXT = [(k, v) for k, vs in BAD.items() if k not in ANY_TEXT for v in vs if type(v) in (str, int) and v != 7]


@pytest.mark.parametrize(("key", "value"), BAD_TEXT)
def test_a_bad_variable_is_refused_with_its_key(key: str, value: object) -> None:
    with pytest.raises(Refused) as refused:
        load(None, {"HIBERNODE_" + key.upper().replace(".", "__"): str(value)})
    assert str(refused.value.details["property"]).startswith(key)


@pytest.mark.parametrize(
    "name", ["SURPRISE", "STORE__SURPRISE", "STORE__S3__X", "NODE__X", "", "STORE___URL", "STORE__URL__X", "LOG"]
)  # fmt: skip
@pytest.mark.parametrize("text", ["", 'node = "a"\n[store]\nurl = "file:///a"\n'])
def test_a_variable_nobody_knows_is_refused(tmp_path: Path, name: str, text: str) -> None:
    """A typo must not mean the default."""
    with pytest.raises(Refused) as refused:
        loaded(tmp_path, text, {"HIBERNODE_" + name: "1"})
    assert refused.value.code == "config"


def test_variables_of_others_are_left_alone() -> None:
    environ = {
        "PATH": "/bin",
        "HIBERNODE_CONFIG": "/x",
        "HIBERNODE_SOCKET_PATH": "/y",
        "HIBERNODE_TEST_DISALLOW_SKIP": "1",
        "OTHER": "z",
    }
    assert load(None, environ) == load(None, {})


def test_the_environment_is_over_the_file_over_the_defaults(tmp_path: Path) -> None:
    text = 'node = "file"\ncluster = "file"\n[store]\nurl = "file:///file"\n[store.s3]\nregion = "file"\npart_size = "16MiB"\n'
    environ = {
        "HIBERNODE_NODE": "env", "HIBERNODE_STORE__URL": "file:///env", "HIBERNODE_STORE__ALLOWED": "file:///a,s3://b/c",
        "HIBERNODE_ARENA__SIZE": "1GiB", "HIBERNODE_LIMITS__ACTIONS": "7", "HIBERNODE_STORE__S3__PROFILE": "env",
    }  # fmt: skip
    found = loaded(tmp_path, text, environ)
    assert (found.node, found.cluster) == ("env", "file")
    assert found.store.url == "file:///env"
    assert found.store.allowed == ("file:///a", "s3://b/c")
    assert (found.store.s3.region, found.store.s3.profile, found.store.s3.part_size) == ("file", "env", 16 << 20)
    assert (found.arena.size, found.limits.actions, found.limits.attempts) == (1 << 30, 7, 3)


@pytest.mark.parametrize("data", [b"node = ", b"\xff\xfe", b"[store\n", b"node = 1\nnode = 2\n", b"a" * 1000])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(data)
    with pytest.raises(Refused) as refused:
        load(tmp_path / "bad.toml", {})
    assert refused.value.details["property"] == "file"
    assert str(tmp_path / "bad.toml") in refused.value.message


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused):
        load(tmp_path / name, {})


# --- what is shown ----------------------------------------------------------------------------------------------------------

SECRET = "correct-horse"


@pytest.mark.parametrize(
    "environ",
    [
        {"HIBERNODE_BUS__PASSWORD": SECRET},
        {"HIBERNODE_STORE__S3__SECRET_ACCESS_KEY": SECRET},
        {"HIBERNODE_BUS__URL": f"nats://me:{SECRET}@host:4222"},
        {"HIBERNODE_BUS__URL": f"nats://{SECRET}@host:4222,tls://me:{SECRET}@b"},
        {"HIBERNODE_STORE__S3__ENDPOINT_URL": f"https://me:{SECRET}@host"},
    ],
)
def test_secrets_are_never_shown(environ: dict[str, str]) -> None:
    found = load(None, environ)
    for text in (
        render(found),
        repr(found.bus.password),
        str(found.store.s3.secret_access_key),
        config.without_secrets(found.bus.url),
    ):
        assert SECRET not in text
    assert "host" in render(found) or "url" not in next(iter(environ)).lower()


@pytest.mark.parametrize(
    "text",
    [f'[bus]\npassword = ["{SECRET}"]\n', f'[store.s3]\nsecret_access_key = {{a = "{SECRET}"}}\n', f'bus = "nats://me:{SECRET}@host"\n',
     f'[bus]\npassord = "{SECRET}"\n', f'[bus]\nurl = ["nats://me:{SECRET}@host"]\n', f'[store]\ns3 = "{SECRET}"\n'],
)  # fmt: skip
def test_a_refusal_does_not_show_a_secret_either(tmp_path: Path, text: str) -> None:
    with pytest.raises(Refused) as refused:
        loaded(tmp_path, text)
    assert SECRET not in f"{refused.value} {refused.value.details}"


def test_what_is_rendered_can_be_read_again() -> None:
    found = load(None, {})
    assert Config.model_validate(tomllib.loads(render(found))) == found


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(texts, st.lists(texts, max_size=3), st.floats(0, 1e9), st.integers(5 << 20, 5 << 30), texts)
def test_any_text_is_rendered_so_that_it_can_be_read_again(
    url: str, allowed: list[str], delay: float, size: int, directory: str
) -> None:
    values: dict[str, Any] = {
        "state_dir": Path("/" + directory), "store": {"url": url, "allowed": allowed, "s3": {"part_size": size, "region": url}},
        "limits": {"retry_delay": delay}, "criu": {"path": directory},
    }  # fmt: skip
    found = Config.model_validate(values)
    if all(config.without_secrets(text) == text for text in (url, *allowed, directory)):
        assert Config.model_validate(tomllib.loads(render(found))) == found


def test_every_key_is_rendered() -> None:
    data = tomllib.loads(render(load(None, {})))

    def insist(section: type[BaseModel], found: dict[str, Any]) -> None:
        assert found.keys() == section.model_fields.keys()
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                insist(field.annotation, found[name])

    insist(Config, data)


def test_it_cannot_be_changed_after_it_was_loaded() -> None:
    with pytest.raises(Exception, match="frozen"):
        load(None, {}).store.url = "file:///other"  # type: ignore[misc]


def test_criu_is_the_configured_one_else_the_one_beside_the_interpreter() -> None:
    assert load(None, {"HIBERNODE_CRIU__PATH": "/opt/criu"}).criu_path() == "/opt/criu"
    assert load(None, {}).criu_path().endswith("criu")


def test_the_arguments_of_the_key_service_are_not_shown() -> None:
    found = Config.model_validate({"encryption": {"command": ("/bin/kms", "--token", "S3CRET")}})
    assert "S3CRET" not in render(found)
    assert '"/bin/kms"' in render(found)


@pytest.mark.parametrize("table", ["encryption", "signing"])
def test_what_the_daemon_would_refuse_check_config_refuses(tmp_path: Path, table: str) -> None:
    path = tmp_path / "hibernode.toml"
    path.write_text(f'[{table}]\nkey = "{tmp_path}/nothing"\n')
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-m", "hibernode", "check-config", "--config", str(path)]
    ran = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 78
    assert f"{table}.key" in ran.stderr


def test_a_node_of_kubernetes_is_named_after_it_unless_it_has_a_name(tmp_path: Path) -> None:
    """There the host name is the pod's, and a subject of the stream has no dots."""
    environ = {"HIBERNODE_KUBERNETES__NODE_NAME": "gpu-1.example.com"}
    found = load(None, environ)
    assert (found.node, found.kubernetes.node_name) == ("gpu-1-example-com", "gpu-1.example.com")
    assert load(None, {**environ, "HIBERNODE_NODE": "mine"}).node == "mine"
    with pytest.raises(Refused, match="kubernetes"):
        load(None, {"HIBERNODE_KUBERNETES": "x"})

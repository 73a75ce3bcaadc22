"""A checkpoint of a real process, damaged in the store of a real daemon: every change is refused before anybody runs, no process appears,
and what was damaged is restored once it is whole again. And the third of a chain, encrypted and signed, with damage in all three."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import keys
from tests.daemon import Daemon
from tests.damage import harm, real
from tests.damage.real import Real
from tests.damage.trial import Bench

pytestmark = [pytest.mark.node, pytest.mark.timeout(100)]

SEED = 1
CASES = 200
OF_A_CHAIN, FOLLOWED = 40, 10


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Real]:
    with Daemon() as daemon, real.program(tmp_path) as running:
        yield real.real(daemon, running)


def test_the_daemon_refuses_every_damage_and_restores_what_is_whole_again(stored: Real) -> None:
    everything = {real.NAME: stored.stored}
    for number in range(CASES):
        one, after = harm.draw(everything, SEED, number)
        trial = stored.play(one, after)
        assert not trial.wrong, f"seed {SEED}, number {number}: {one.id}: {trial.wrong}"
    stored.still_restores()


def test_so_does_the_page_on_fakes(stored: Real) -> None:
    """Other numbers, and it is seen there whether a thread or a descriptor is left."""
    everything = {real.NAME: stored.stored}
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="hn-damage-") as directory:
        bench = Bench(Path(directory), everything)
        bench.insist_restores(stored.stored)
        for number in range(CASES, 3 * CASES):
            one, after = harm.draw(everything, SEED, number)
            trial = bench.play(one, after)
            assert not trial.wrong, f"seed {SEED}, number {number}: {one.id}: {trial.wrong}"


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Real]:
    settings = keys.closed(tmp_path)
    (tmp_path / "fakes").mkdir()
    with Daemon(settings=settings) as daemon, real.changing(tmp_path) as running:
        yield real.chain(daemon, running, tmp_path / "fakes", **settings)


@pytest.mark.timeout(200)  # each that is restored is looked at while it goes on
def test_of_a_chain_all_that_is_needed_is_looked_at_and_nothing_else(chain: Real) -> None:
    everything = {real.CHAIN: chain.stored}
    for play, numbers in ((chain.play, range(OF_A_CHAIN)), (chain.follow, range(FOLLOWED))):
        for number in numbers:
            one, after = harm.draw(everything, SEED, number)
            trial = play(one, after)
            assert not trial.wrong, f"seed {SEED}, number {number}: {one.id}: {trial.wrong}"
    chain.still_restores()

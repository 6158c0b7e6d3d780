"""Each kind of fault once, to short real runs; the long version is `make chaos`."""

import random

import pytest

from tests.chaos.disturbed import Undisturbed, disturb
from tests.chaos.faults import ALL, CheckpointDamaged, KillNode, SecondStart, ShardGone
from tests.chaos.soak import can_mount, make_all_data, packs, run_of, work

FAST = (KillNode, CheckpointDamaged, ShardGone, SecondStart)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_all_data(tmp_path_factory.mktemp("chaos"))


def verdict_of(data, place, kinds, processes, workers):
    whole = Undisturbed(run_of(data, place / "whole", processes, 0))
    return work(data, place, (processes, workers, kinds), 0, whole)


@pytest.mark.timeout(300)
def test_four_faults_to_one_run(data, tmp_path):
    verdict = verdict_of(data, tmp_path, FAST, 1, 0)
    assert verdict.good(), verdict
    assert [one.kind for one in verdict.struck] == [kind.__name__ for kind in FAST]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_kind_once(data, tmp_path, processes):
    kinds = [k for k in ALL if not k.needs_small_disk or can_mount(tmp_path / "trial")]
    whole = Undisturbed(run_of(data, tmp_path / "whole", processes, 0))
    for number, (chosen, workers) in enumerate(packs(kinds, processes, random.Random(1))):
        verdict = work(data, tmp_path / f"{number}", (processes, workers, chosen), number, whole)
        assert verdict.good(), (chosen, verdict)


def test_other_pairs_would_be_seen(data, tmp_path):
    whole = Undisturbed(run_of(data, tmp_path / "whole", 1, 0))
    other = run_of(data, tmp_path / "other", 1, 0)
    other.overrides.append("seed=1")  # another order
    verdict = disturb(other, [], random.Random(0), whole)
    assert not verdict.good() and not verdict.same_losses

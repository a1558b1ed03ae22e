"""How a calibration set is divided among processes."""

import pytest
import torch

from quantpress.calibrate.lanes import LANES, Lanes
from quantpress.core.ranks import Ranks


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 36, 128, 131])
@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_every_sample_is_in_one_lane_of_one_process(samples: int, batch_tokens: int) -> None:
    one = Lanes.of(samples, 64, batch_tokens)
    assert one.count <= LANES
    assert one.own().tolist() == list(range(samples))
    for size in range(1, one.count + 1):
        parts = [Lanes.of(samples, 64, batch_tokens, Ranks(rank, size)) for rank in range(size)]
        assert sorted(i for part in parts for i in part.own().tolist()) == list(range(samples))
        rounds = [list(part.rounds()) for part in parts]
        for together in zip(*rounds, strict=True):
            assert {len({r.holders for r in together}), len({len(x) for x in rounds})} == {1}
            assert [r.batches > 0 for r in together] == [i < together[0].holders for i in range(size)]
        lanes = sorted((r.lane, r.batches) for of_one in rounds for r in of_one if r.batches)
        assert lanes == [(r.lane, r.batches) for r in one.rounds()]
        # Only the last batch of all is shorter: each process splits what it has into equal ones.
        for part, own in zip(parts, rounds, strict=True):
            batches = torch.split(part.own(), part.batch)
            assert len(batches) == sum(r.batches for r in own)
            assert all(int(b[-1] - b[0]) == len(b) - 1 for b in batches)


def test_a_small_set_is_not_cut_into_batches_of_few_tokens() -> None:
    assert Lanes.of(6, 32, 4096).batches == 1
    assert Lanes.of(36, 128, 4096).batch == 5
    assert Lanes.of(128, 2048, 32768).batch == 16

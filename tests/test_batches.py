"""Batches: a pure function of (seed, step) that reads the entire corpus once per epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import IGNORED
from plaingpt.batches import EvalBatches, TrainBatches, derive_seed, permute
from plaingpt.console import UserError
from plaingpt.tokens import Tokens

BLOCK = 8


def ring(length: int) -> Tokens:
    """A corpus in which the id is the position."""
    return Tokens(np.array_split(np.arange(length, dtype=np.uint16), 3))


def batches(length=100, block_size=BLOCK, sequences=4, seed=1) -> TrainBatches:
    return TrainBatches(ring(length), block_size, sequences, seed)


def epoch_starts(length: int, epoch: int, seed: int = 1) -> list[int]:
    """Where the windows of an epoch begin; a step of one sequence makes a step a window."""
    one_a_step = batches(length, sequences=1, seed=seed)
    return [int(one_a_step.starts(epoch * one_a_step.windows + i)[0]) for i in range(one_a_step.windows)]


# training


def test_inputs_are_windows_of_the_corpus_and_targets_are_one_further():
    inputs, targets = batches(100).micro_batch(step=3, index=0, batch_size=4)
    assert inputs.shape == targets.shape == (4, BLOCK)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs[:, 0].tolist() == (batches(100).starts(3) % 100).tolist()
    for row, target in zip(inputs, targets):
        assert row.tolist() == [(int(row[0]) + i) % 100 for i in range(BLOCK)]
        assert target.tolist() == [(int(row[0]) + i + 1) % 100 for i in range(BLOCK)]


def test_masked_targets_do_not_change_the_inputs():
    inputs, targets = batches(100).micro_batch(step=3, index=0, batch_size=4)
    before = inputs.clone()
    targets[:] = IGNORED
    assert inputs.equal(before)


def test_a_batch_depends_on_seed_and_step_and_on_nothing_that_came_before():
    walked = batches()
    all_in_turn = [walked.micro_batch(step, 0, 4)[0].tolist() for step in range(20)]
    jumped = batches()
    assert [jumped.micro_batch(step, 0, 4)[0].tolist() for step in reversed(range(20))] == all_in_turn[::-1]
    assert len({str(batch) for batch in all_in_turn}) == 20
    assert batches(seed=2).micro_batch(0, 0, 4)[0].tolist() != all_in_turn[0]


@pytest.mark.parametrize(("micro_batches", "batch_size"), [(8, 1), (4, 2), (2, 4)])
def test_an_update_has_the_same_sequences_in_the_same_order_however_it_is_divided(micro_batches, batch_size):
    whole = batches(1000, sequences=8).micro_batch(5, 0, 8)
    parts = [batches(1000, sequences=8).micro_batch(5, index, batch_size) for index in range(micro_batches)]
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), whole[0])
    assert torch.equal(torch.cat([targets for _, targets in parts]), whole[1])


@pytest.mark.parametrize("length", [96, 97, 100, 103])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_reads_every_window_once(length, epoch):
    starts = sorted(epoch_starts(length, epoch))
    assert len(starts) == length // BLOCK
    assert set(np.diff(starts)) == {BLOCK}
    predicted = {(start + i) % length for start in starts for i in range(BLOCK)}
    assert len(predicted) == length // BLOCK * BLOCK


def test_each_epoch_has_an_order_and_a_shift_of_its_own():
    epochs = [epoch_starts(400, epoch) for epoch in range(6)]
    orders = {tuple(np.argsort(starts).tolist()) for starts in epochs}
    shifts = {min(starts) for starts in epochs}
    assert len(orders) == 6 and tuple(range(50)) not in orders
    assert len(shifts) > 2 and all(0 <= shift < BLOCK for shift in shifts)


def test_an_update_that_goes_past_the_end_of_an_epoch_goes_on_with_the_next():
    two_epochs = epoch_starts(100, 0) + epoch_starts(100, 1)
    of_five = batches(100, sequences=5)
    assert [int(start) for step in range(4) for start in of_five.starts(step)] == two_epochs[:20]


def test_an_update_may_be_longer_than_an_epoch():
    starts = batches(20, sequences=7).starts(0).tolist()
    assert starts == [start for epoch in range(4) for start in epoch_starts(20, epoch)][:7]


def test_step_far_into_a_long_run_is_as_good_as_the_first():
    inputs, targets = batches(100).micro_batch(10**9, 0, 4)
    assert torch.equal((inputs + 1) % 100, targets)


def test_the_data_order_of_a_seed_stays_what_it_is():
    """A run that is resumed with a later version reads on where it stopped."""
    assert batches(1000, sequences=6, seed=1337).starts(2).tolist() == [774, 398, 838, 94, 870, 710]


# the permutation


@settings(max_examples=150)
@given(n=st.integers(1, 700), key=st.integers(0, 2**63 - 1))
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 4096, 65536, 100_003])
def test_permute_is_a_permutation_around_powers_of_four_and_above(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key=7)), np.arange(n))


@settings(max_examples=30)
@given(n=st.integers(2, 2**40), key=st.integers(0, 2**63 - 1), data=st.data())
def test_permute_of_one_index_does_not_depend_on_the_others(n, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5, unique=True)))
    together = permute(index, n, key)
    assert together.tolist() == [int(permute(index[i : i + 1], n, key)[0]) for i in range(len(index))]
    assert len(set(together.tolist())) == len(index) and together.min() >= 0 and together.max() < n


def test_permute_mixes_well_enough_that_neighbours_part():
    order = permute(np.arange(10_000), 10_000, key=3)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) < 10) < 0.01


def test_mix_gives_a_stream_of_its_own_for_each_purpose():
    keys = [(0,), (1,), (-1,), (10,), (0, 0), (0, 1), (1, 0), (1, 1), (1, 11), (11, 1), (0, 0, 0)]
    numbers = {derive_seed(*key) for key in keys}
    assert len(numbers) == len(keys) and all(0 <= number < 2**63 for number in numbers)


# evaluation


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18, 100, 129])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_without_a_limit_every_token_but_the_first_is_a_target_once(length, batch_size):
    evaluation = EvalBatches(ring(length), BLOCK, batch_size, 0)
    pairs = []
    for index in range(len(evaluation)):
        inputs, targets = evaluation.batch(index)
        assert inputs.shape == targets.shape == (batch_size, BLOCK)  # one shape to compile for
        assert inputs.dtype == targets.dtype == torch.int64
        counted = targets != IGNORED
        pairs += zip(inputs[counted].tolist(), targets[counted].tolist())
        assert counted.any()
    assert sorted(pairs) == [(i, i + 1) for i in range(length - 1)]


def test_positions_without_a_target_are_ignored_and_their_inputs_are_ids():
    inputs, targets = EvalBatches(ring(11), BLOCK, 3, 0).batch(0)
    assert targets.tolist() == [list(range(1, 9)), [9, 10, *[IGNORED] * 6], [IGNORED] * 8]
    assert inputs[0].tolist() == list(range(8)) and inputs[1, :2].tolist() == [8, 9]
    assert inputs.min() >= 0 and inputs.max() <= 10
    inputs, targets = EvalBatches(ring(11), BLOCK, 3, 0).batch(1)  # of a rank without a batch
    assert (targets == IGNORED).all() and inputs.min() >= 0 and inputs.max() <= 10


@pytest.mark.parametrize("batch_size", [1, 5, 7, 20, 64])
def test_the_sequences_of_an_evaluation_do_not_depend_on_the_batch_size(batch_size):
    evaluation = EvalBatches(ring(1601), BLOCK, batch_size, 20)  # of 200 windows
    rows = [row for i in range(len(evaluation)) for row in zip(*evaluation.batch(i)) if row[1][0] != IGNORED]
    assert [inputs[0].item() for inputs, _ in rows] == [i * 10 * BLOCK for i in range(20)]
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in rows)


def test_a_limit_beyond_the_split_is_the_entire_split():
    few, all_of_them = EvalBatches(ring(100), BLOCK, 4, 4000), EvalBatches(ring(100), BLOCK, 4, 0)
    assert len(few) == len(all_of_them) == 4
    assert all(torch.equal(few.batch(i)[1], all_of_them.batch(i)[1]) for i in range(4))


# too little text


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK])
def test_a_split_that_is_too_short_for_one_block_is_refused_with_split_sizes_and_remedy(length):
    tokens = ring(length)
    remedy = r"prepare more text, or set --block_size=\d" if length > 1 else "prepare more text"
    with pytest.raises(UserError, match=rf"^the train split has {length} tokens?, .* block of 8: {remedy}$"):
        TrainBatches(tokens, BLOCK, 1, seed=1)
    with pytest.raises(UserError, match=rf"^the val split has {length} tokens?,"):
        EvalBatches(tokens, BLOCK, 1, 0)


def test_the_shortest_split_is_a_block_and_its_last_target():
    inputs, targets = TrainBatches(ring(BLOCK + 1), BLOCK, 1, seed=1).micro_batch(0, 0, 1)
    assert torch.equal((inputs + 1) % (BLOCK + 1), targets)
    assert EvalBatches(ring(BLOCK + 1), BLOCK, 1, 0).batch(0)[1].tolist() == [list(range(1, 9))]

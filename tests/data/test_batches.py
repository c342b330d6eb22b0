"""Batches: a pure function of dataset, seed and step; every token once an epoch; the same from any number of hosts."""

import collections

import numpy as np
import pytest

from lmjax.data.batches import Batches, EpochOrder, EvaluationBatches, RowReader
from lmjax.data.plans import ensure_plan
from lmjax.data.shards import verify_shards
from lmjax.errors import InputError

pytestmark = pytest.mark.fast
LENGTH = 16
BATCH = 12


@pytest.fixture
def documents(rng):
    """A first token that no other document has, then random ones; the last three are longer than a row."""
    lengths = [*(2 + number * 7 % 15 for number in range(60)), 17, 40, 100]
    return [np.append(1000 + number, rng.integers(3, 900, length - 1)) for number, length in enumerate(lengths)]


@pytest.fixture(params=["best_fit", "concat"])
def packing(request):
    return request.param


@pytest.fixture
def dataset(make_dataset, documents, packing):
    directory, index = make_dataset(train=documents, documents_per_shard=20)
    plan = ensure_plan(directory, index, split="train", sequence_length=LENGTH, packing=packing)
    return directory, index, plan


def batches(dataset, *, seed=0, global_batch_size=BATCH):
    directory, index, plan = dataset
    return Batches(directory, index, [plan], global_batch_size=global_batch_size, seed=seed)


def pieces_of(batch):
    """Each piece of a batch as (its tokens, its last weight)."""
    for tokens, segments, weights in zip(batch.tokens, batch.segment_ids, batch.weights, strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            yield tuple(tokens[here].tolist()), weights[here].tolist()


def equal(left, right):
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


def test_one_epoch_holds_every_token_of_every_document_once(dataset, documents, packing):
    source = batches(dataset, global_batch_size=1)
    pieces = [piece for step in range(source.num_rows) for piece in pieces_of(source.rows(step, 0, 1))]
    # Follow each document from its first token, piece by piece: what is left over or missing shows.
    remaining = collections.Counter(tokens for tokens, _ in pieces)
    cuts = 0
    for document in documents:
        left = tuple(document.tolist())
        while left:
            piece = next(size for size in range(len(left), 0, -1) if remaining[left[:size]] > 0)
            remaining[left[:piece]] -= 1
            left = left[piece:]
            cuts += bool(left)
    assert not +remaining, "no token twice, none that is in no document"
    assert cuts == dataset[2].lost_targets > 0
    targets = sum(sum(weights) for _, weights in pieces)
    assert targets == sum(len(document) - 1 for document in documents) - cuts


def test_a_row_equals_its_pieces_one_after_the_other(dataset):
    source = batches(dataset)
    batch = source.rows(0, 0, BATCH)
    assert [field.dtype for field in batch] == [np.int32] * 4 + [np.float32]
    assert {field.shape for field in batch} == {(BATCH, LENGTH)}
    assert (batch.segment_ids == 0).any() == (dataset[2].packing == "best_fit"), "the case with padding is there"
    for row in range(BATCH):
        tokens, targets, segments, positions, weights = ([*field[row].tolist()] for field in batch)
        expected = ([], [], [], [])
        for segment in range(1, max(segments) + 1):
            piece = [token for token, here in zip(tokens, segments, strict=True) if here == segment]
            expected[0].extend([*piece[1:], 0])
            expected[1].extend([segment] * len(piece))
            expected[2].extend(range(len(piece)))
            expected[3].extend([1.0] * (len(piece) - 1) + [0.0])
        padding = [0] * (LENGTH - len(expected[0]))
        assert [targets, segments, positions, weights] == [[*values, *padding] for values in expected]
        assert tokens[len(expected[0]) :] == padding


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 6])
def test_any_number_of_hosts_reads_the_same_global_batch(dataset, hosts):
    whole = batches(dataset)
    each = BATCH // hosts
    sources = [batches(dataset) for _ in range(hosts)]
    for step in (0, 3, 7):
        parts = [source.rows(step, host * each, (host + 1) * each) for host, source in enumerate(sources)]
        joined = type(parts[0])(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
        assert equal(joined, whole.rows(step, 0, BATCH))
        if hosts > 1:
            swapped = type(parts[0])(*(np.concatenate(fields) for fields in zip(*parts[::-1], strict=True)))
            assert not equal(swapped, whole.rows(step, 0, BATCH)), "control: the order of the hosts matters"


def test_resuming_at_any_step_goes_on_with_the_same_batches(dataset):
    source = batches(dataset)
    steps = 3 * source.num_rows // BATCH
    straight = [source.hash(step) for step in range(steps)]
    assert len(set(straight)) == steps
    for start in range(steps):
        assert batches(dataset).hash(start) == straight[start]
    assert [source.hash(step) for step in reversed(range(steps))] == straight[::-1]
    assert batches(dataset, seed=1).hash(0) not in straight, "control: another seed"


def test_a_batch_that_spans_epochs_holds_the_end_of_one_and_the_start_of_the_next(dataset):
    rows = dataset[2].num_rows
    assert rows % BATCH, "or no batch would span epochs"
    source = batches(dataset)
    numbers = np.concatenate([source.row_numbers(step, 0, BATCH) for step in range(rows)])
    epochs = numbers.reshape(BATCH, rows)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(rows))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == BATCH, "each epoch has an order of its own"
    wide = batches(dataset, global_batch_size=2 * rows + 1)
    assert np.array_equal(wide.row_numbers(0, 0, 2 * rows + 1), numbers[: 2 * rows + 1])


def test_neighbouring_seeds_share_no_epoch():
    orders = {
        (seed, tuple(EpochOrder(50, seed)[50 * epoch + row] for row in range(50)))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len({order for _, order in orders}) == 16


def test_the_order_is_the_one_of_the_first_release():
    """Frozen values: a change of grain's shuffle, or of the seeds, would change the batches of every run."""
    order = EpochOrder(1000, 0)
    assert [order[place] for place in (0, 1, 2, 3, 999, 1000, 1001, 5_000_000)] == [
        574,
        748,
        142,
        773,
        694,
        474,
        295,
        194,
    ]
    large = EpochOrder(2**31, 2**40)
    assert [large[place] for place in (0, 1, 2**31)] == [1694345040, 1975223365, 1923003824]


def test_the_hash_tells_tokens_and_segments(dataset, monkeypatch):
    source = batches(dataset)
    whole = source.rows(2, 0, BATCH)
    seen = {source.hash(2)}
    for field in ("tokens", "segment_ids"):
        changed = getattr(whole, field).copy()
        changed[5, 3] += 1
        monkeypatch.setattr(source, "rows", lambda *_, field=field, changed=changed: whole._replace(**{field: changed}))
        seen.add(source.hash(2))
    assert len(seen) == 3
    monkeypatch.setattr(source, "rows", lambda *_: whole)
    assert source.hash(2) in seen


def test_evaluation_passes_once_in_order_and_fills_the_last_batch(dataset):
    plan = dataset[2]
    size = 7 if plan.num_rows % 7 else 5
    source = EvaluationBatches(*dataset, global_batch_size=size)
    assert source.num_batches == plan.num_rows // size + 1
    parts = [source.rows(number, 0, size) for number in range(source.num_batches)]
    joined = type(parts[0])(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
    straight = RowReader(*dataset).read(np.arange(plan.num_rows))
    assert equal(type(joined)(*(field[: plan.num_rows] for field in joined)), straight)
    for field in joined:
        assert not field[plan.num_rows :].any()
    halves = [source.rows(source.num_batches - 1, *part) for part in ((0, 3), (3, size))]
    assert equal([np.concatenate(fields) for fields in zip(*halves, strict=True)], parts[-1])


def test_no_rows_is_an_error(make_dataset, documents):
    directory, index = make_dataset(train=documents, validation=[])
    plan = ensure_plan(directory, index, split="validation", sequence_length=LENGTH, packing="best_fit")
    with pytest.raises(InputError, match="no documents"):
        Batches(directory, index, [plan], global_batch_size=2, seed=0)
    assert EvaluationBatches(directory, index, plan, global_batch_size=2).num_batches == 0


@pytest.mark.parametrize("damage", ["rot", "cut", "remove"])
def test_a_damaged_shard_is_an_error_that_names_it(dataset, tmp_path, damage):
    whole = batches(dataset).rows(0, 0, BATCH)
    file = tmp_path / "dataset" / dataset[1].shards[1].file
    original = file.read_bytes()
    third = len(original) // 3
    if damage == "rot":
        changed = bytes(byte ^ 1 for byte in original[third : 2 * third])
        file.write_bytes(original[:third] + changed + original[2 * third :])
    elif damage == "cut":
        file.write_bytes(original[:third])
    else:
        file.unlink()
    epoch = -(-dataset[2].num_rows // BATCH)
    with pytest.raises(InputError, match=file.name):
        verify_shards(*dataset[:2], "train")
    damaged = batches(dataset)
    with pytest.raises(InputError, match=file.name):
        [damaged.rows(step, 0, BATCH) for step in range(epoch)]
    file.write_bytes(original)
    verify_shards(*dataset[:2], "train")
    assert equal(batches(dataset).rows(0, 0, BATCH), whole)


def test_a_part_of_the_evaluation_rows_is_spread_over_the_split(dataset):
    whole = EvaluationBatches(*dataset, global_batch_size=1)
    some = EvaluationBatches(*dataset, global_batch_size=1, max_rows=3)
    assert some.num_batches == 3
    total = whole.num_rows
    for number, row in enumerate((0, total // 3, 2 * total // 3)):
        assert equal(some.rows(number, 0, 1), whole.rows(row, 0, 1))
    assert EvaluationBatches(*dataset, global_batch_size=1, max_rows=total + 5).num_rows == total

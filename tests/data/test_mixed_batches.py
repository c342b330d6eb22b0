"""Batches of weighted sources: a pure function of dataset, mixture, seed and step; each source has its own epochs."""

import collections
import dataclasses

import numpy as np
import pytest

from lmjax.data.batches import Batches, EpochOrder, _seed_of
from lmjax.data.index import fingerprint
from lmjax.data.mixture import Mixture, Stage
from lmjax.data.plans import ensure_plan
from lmjax.errors import InputError

pytestmark = pytest.mark.fast
LENGTH = 8
BATCH = 10
NAMES = ("web", "code", "books")
MIXTURE = Mixture(NAMES, (None, None, None), (Stage(0, (0.5, 0.3, 0.2)),))
COUNTS = {"web": 45, "code": 27, "books": 18}
DOCUMENTS_PER_SHARD = 9


@pytest.fixture
def dataset(make_dataset, rng):
    """Each document's first token tells its source and its number: 1000 + number, 2000 + number, 3000 + number."""
    documents = [
        np.append(1000 * (place + 1) + number, rng.integers(3, 900, 1 + number * 7 % 14))
        for place, name in enumerate(NAMES)
        for number in range(COUNTS[name])
    ]
    directory, index = make_dataset(train=documents, documents_per_shard=DOCUMENTS_PER_SHARD)
    owners = [name for name in NAMES for _ in range(COUNTS[name] // DOCUMENTS_PER_SHARD)]
    shards = (dataclasses.replace(shard, source=name) for shard, name in zip(index.shards, owners, strict=True))
    index = dataclasses.replace(index, shards=tuple(shards))
    return directory, index


@pytest.fixture(params=["best_fit", "concat"])
def plans(dataset, request):
    return [
        ensure_plan(*dataset, split="train", source=name, sequence_length=LENGTH, packing=request.param)
        for name in NAMES
    ]


def batches(dataset, plans, *, mixture=MIXTURE, seed=0, batch=BATCH, steps=None):
    return Batches(*dataset, plans, global_batch_size=batch, seed=seed, mixture=mixture, steps=steps)


def sources_of(batch):
    """The source of each row, by its pieces' first tokens, with the documents that begin in it."""
    for tokens, positions, segments in zip(batch.tokens, batch.positions, batch.segment_ids, strict=True):
        first = tokens[(positions == 0) & (segments > 0)]
        yield [int(token) for token in first if token >= 1000]


def equal(left, right):
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


def test_every_source_is_seen_whole_once_an_epoch_whatever_the_others_do(dataset, plans):
    """The ledger: which documents begin in the rows of each source's first epochs."""
    source = batches(dataset, plans, batch=1)
    ledger = {name: [collections.Counter(), collections.Counter()] for name in NAMES}
    seen = dict.fromkeys(NAMES, 0)
    rows = dict(zip(NAMES, (plan.num_rows for plan in plans), strict=True))
    orders = {name: [[], []] for name in NAMES}
    for step in range(2 * max(rows.values()) * 5):
        (name,) = [name for name, count in source.mixture(step).items() if count]
        epoch, seen[name] = seen[name] // rows[name], seen[name] + 1
        if epoch < 2:
            (begun,) = sources_of(source.rows(step, 0, 1))
            assert all(token // 1000 == 1 + NAMES.index(name) for token in begun), "a row is of one source"
            ledger[name][epoch].update(begun)
            orders[name][epoch] += source.row_numbers(step, 0, 1).tolist()
    for place, name in enumerate(NAMES):
        expected = dict.fromkeys(range(1000 * (place + 1), 1000 * (place + 1) + COUNTS[name]), 1)
        assert [dict(counter) for counter in ledger[name]] == [expected, expected], name
        assert sorted(orders[name][0]) == sorted(orders[name][1]) == list(range(rows[name]))
    assert orders["web"][0] != orders["web"][1], "each epoch has an order of its own"


def test_the_mixture_of_a_step_is_what_its_rows_hold(dataset, plans):
    source = batches(dataset, plans)
    for step in range(12):
        batch = source.rows(step, 0, BATCH)
        assert source.mixture(step) == {"web": 5, "code": 3, "books": 2}
        tokens = source.mixture_tokens(step)
        assert list(tokens) == list(NAMES)
        assert sum(tokens.values()) == (batch.segment_ids > 0).sum()
        begun = collections.Counter(NAMES[token // 1000 - 1] for row in sources_of(batch) for token in row[:1])
        assert all(begun[name] <= count for name, count in source.mixture(step).items())
    seventh = batches(dataset, plans, batch=7)
    total = collections.Counter()
    for step in range(10):
        total.update(seventh.mixture(step))
    assert total == {"web": 35, "code": 21, "books": 14}


@pytest.mark.parametrize("hosts", [1, 2, 5])
def test_any_number_of_hosts_reads_the_same_global_batch(dataset, plans, hosts):
    whole = batches(dataset, plans)
    each = BATCH // hosts
    for step in (0, 3, 17):
        parts = [batches(dataset, plans).rows(step, host * each, (host + 1) * each) for host in range(hosts)]
        joined = type(parts[0])(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
        assert equal(joined, whole.rows(step, 0, BATCH))
        assert hosts == 1 or not equal(
            type(joined)(*(np.concatenate(fields) for fields in zip(*parts[::-1], strict=True))), joined
        ), "control: the order of the hosts matters"


def test_resuming_at_any_step_goes_on_with_the_same_batches(dataset, plans):
    mixture = MIXTURE._replace(stages=(*MIXTURE.stages, Stage(5, (0.0, 1.0, 1.0)), Stage(11, (1.0, 2.0, 0.0))))
    straight = [batches(dataset, plans, mixture=mixture).hash(step) for step in range(16)]
    source = batches(dataset, plans, mixture=mixture)
    assert [source.hash(step) for step in reversed(range(16))] == straight[::-1]
    assert batches(dataset, plans, mixture=mixture, seed=1).hash(0) not in straight, "control: another seed"
    other = batches(dataset, plans)
    same = [other.hash(step) == straight[step] for step in range(16)]
    assert same == [True] * 5 + [False] * 11, "weights from step 5 on leave what is before as it is"


def test_the_order_of_a_source_does_not_depend_on_the_others_weights(dataset, plans):
    def order(weights, name):
        source = batches(dataset, plans, mixture=MIXTURE._replace(stages=(Stage(0, weights),)), batch=1)
        steps = [step for step in range(60) if source.mixture(step)[name]]
        return [int(source.row_numbers(step, 0, 1)[0]) for step in steps][:8]

    assert order((0.5, 0.3, 0.2), "code") == order((0.1, 0.9, 0.0), "code")


def test_two_sources_of_equal_size_have_orders_of_their_own(make_dataset, rng):
    directory, index = make_dataset(train=[rng.integers(3, 900, LENGTH) for _ in range(40)], documents_per_shard=20)
    shards = (dataclasses.replace(shard, source=name) for shard, name in zip(index.shards, "ab", strict=True))
    index = dataclasses.replace(index, shards=tuple(shards))
    plans = [
        ensure_plan(directory, index, split="train", source=name, sequence_length=LENGTH, packing="concat")
        for name in "ab"
    ]
    mixture = Mixture(("a", "b"), (None, None), (Stage(0, (1.0, 1.0)),))
    numbers = Batches(directory, index, plans, global_batch_size=40, seed=0, mixture=mixture).row_numbers(0, 0, 40)
    assert sorted(numbers[::2]) == sorted(numbers[1::2]) == list(range(20))
    assert not np.array_equal(numbers[::2], numbers[1::2])


def test_names_are_part_of_a_datasets_identity_and_weights_are_not(dataset):
    _, index = dataset
    swapped = {"web": "code", "code": "web", "books": "books"}
    shards = (dataclasses.replace(shard, source=swapped[str(shard.source)]) for shard in index.shards)
    unnamed = (dataclasses.replace(shard, source=None) for shard in index.shards)
    others = [dataclasses.replace(index, shards=tuple(changed)) for changed in (shards, unnamed)]
    assert len({fingerprint(found) for found in (index, *others)}) == 3


def test_a_source_that_ends_before_the_last_step_is_refused_with_the_arithmetic(dataset, plans):
    books = plans[2].num_rows
    twice = MIXTURE._replace(epochs=(None, None, 2))
    enough = 2 * books * 10 // 2 // BATCH
    batches(dataset, plans, mixture=twice, steps=enough)
    with pytest.raises(InputError) as refused:
        batches(dataset, plans, mixture=twice, steps=enough + 20)
    message = str(refused.value)
    assert f"Of {enough + 20} steps x 10 = {10 * (enough + 20)} rows" in message
    assert (
        f"books: {2 * (enough + 20)} rows are needed, and 2 x {books} = {2 * books} are there: it ends in step "
        f"{enough + 1}" in message
    )
    assert "web" not in message
    with pytest.raises(InputError, match=f"it ends in step {enough + 1}"):
        batches(dataset, plans, mixture=twice, steps=10**12)
    batches(dataset, plans, mixture=MIXTURE, steps=10**6)
    batches(dataset, plans, mixture=twice._replace(stages=(*twice.stages, Stage(enough, (1.0, 1.0, 0.0)))), steps=10**6)


def test_a_source_without_documents_is_refused(dataset, make_dataset):
    directory, index = dataset
    mixture = Mixture((*NAMES, "none"), (None,) * 4, (Stage(0, (1.0,) * 4),))
    plans = [
        ensure_plan(directory, index, split="train", source=name, sequence_length=LENGTH, packing="best_fit")
        for name in mixture.sources
    ]
    with pytest.raises(InputError, match="has no documents of source 'none'"):
        batches(dataset, plans, mixture=mixture)
    smaller = MIXTURE._replace(stages=(Stage(0, (1.0, 0.0, 1.0)),))
    assert batches(dataset, plans[:3], mixture=smaller).mixture(3) == {"web": 5, "code": 0, "books": 5}


def test_without_weights_there_is_one_stream_of_all_documents(dataset):
    plan = ensure_plan(*dataset, split="train", sequence_length=LENGTH, packing="best_fit")
    source = Batches(*dataset, [plan], global_batch_size=BATCH, seed=0)
    assert source.mixture(0) == source.mixture_tokens(0) == {}
    found = {token for step in range(30) for row in sources_of(source.rows(step, 0, BATCH)) for token in row}
    assert {token // 1000 for token in found} == {1, 2, 3}


def test_the_order_of_a_source_is_the_one_of_the_first_release():
    """Frozen values: other ones would change the batches of every mixed run."""
    order = EpochOrder(1000, _seed_of("web", 0))
    assert [order[place] for place in (0, 1, 999, 1000)] == [407, 523, 748, 540]

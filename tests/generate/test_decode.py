"""Generation: what whole forward passes say, token by token, on any mesh and beside any other prompt."""

import numpy as np
import pytest

from lmjax.errors import InputError
from lmjax.generate import decode
from lmjax.generate.decode import Generator
from lmjax.generate.options import Options
from tests import tiny
from tests.generate.case import CONFIG, Letters, Uncached, log_softmax, parameters

PROMPTS = [[1, 5, 6], [1, 7, 8, 9, 10, 11, 12], [1]]
NEW = 9
NEVER = 1 << 20
"""A token beyond the vocabulary."""
MODEL = tiny.with_changes(CONFIG, num_layers=2)


class Endless(Letters):
    """No token ends a text."""

    eos_id: int | None = None


def options_of(**options) -> Options:
    return Options(**{"max_tokens": NEW, "temperature": 0.0} | options)


def generator_on(shape, rng, tokenizer=None, config=MODEL):
    """A function that continues prompts with random parameters on a mesh; the generator, and the parameters there."""
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(*shape))
    _, params = parameters(blueprint, rng)
    generator = Generator(blueprint, tiny.FLOAT32, tokenizer or Endless())

    def generate(prompts, **options):
        found = generator.generate(params, prompts, options_of(**options))
        return [sample for samples in found for sample in samples]

    return generate, generator, params


@pytest.fixture(scope="module")
def one_device(request):
    return generator_on((1, 1, 1), np.random.default_rng(request.config.getoption("--seed")))


def test_greedy_takes_the_most_probable_token_of_whole_forward_passes(one_device):
    generate, _, params = one_device
    uncached = Uncached(tiny.blueprint_of(MODEL, tiny.mesh_of(1, 1, 1)), params)
    found = generate(PROMPTS)
    assert [continuation.finish_reason for continuation in found] == ["length"] * 3
    rows = np.zeros((3, 16), np.int64)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        rows[row, : lengths[row]] = prompt
    for _ in range(NEW):
        logits = np.take_along_axis(uncached.logits(rows), (lengths - 1)[:, None, None], 1)
        rows[np.arange(3), lengths] = logits[:, 0].argmax(-1)
        lengths += 1
    for row, prompt in enumerate(PROMPTS):
        assert found[row].tokens == rows[row, len(prompt) : lengths[row]].tolist()
    assert len({tuple(continuation.tokens) for continuation in found}) == 3


def test_a_text_ends_at_any_of_the_tokens_that_end_one(one_device):
    generate, _, params = one_device
    whole = [continuation.tokens for continuation in generate(PROMPTS)]
    ends = [whole[0][3], whole[1][5], NEVER]
    ending = Generator(tiny.blueprint_of(MODEL, tiny.mesh_of(1, 1, 1)), tiny.FLOAT32, Endless(), ends)
    found = [samples[0] for samples in ending.generate(params, PROMPTS, options_of())]
    for continuation, tokens in zip(found, whole, strict=True):
        first = next((place for place, token in enumerate(tokens) if token in ends), None)
        assert continuation.tokens == tokens[:first]
        assert continuation.finish_reason == ("length" if first is None else "eos")
    assert found[0].finish_reason == found[1].finish_reason == "eos"


@pytest.fixture(scope="module")
def eight_devices(request):
    return generator_on((2, 2, 2), np.random.default_rng(request.config.getoption("--seed")))


def check_equal(found, expected):
    for temperature in (0.0, 0.7):
        assert found(PROMPTS, temperature=temperature) == expected(PROMPTS, temperature=temperature)
    assert found(PROMPTS, temperature=0.7, seed=1) != expected(PROMPTS, temperature=0.7)


def test_sharded_equals_one_device(one_device, eight_devices):
    check_equal(eight_devices[0], one_device[0])


@pytest.mark.slow
def test_more_tensor_devices_than_kv_heads_equal_one_device(one_device, seed):
    generate, _, _ = generator_on((1, 1, 8), np.random.default_rng(seed))
    check_equal(generate, one_device[0])


def test_a_prompt_is_continued_alone_as_among_others_and_its_copies_differently(eight_devices):
    generate, _, _ = eight_devices  # where batches of one to four prompts have the same shape
    together = generate([*PROMPTS, PROMPTS[0]], temperature=1.0)
    alone = generate([PROMPTS[0]], temperature=1.0)
    assert together[0] == alone[0]
    assert together[3] != alone[0]
    assert generate([PROMPTS[0]] * 2, temperature=1.0) == [together[0], together[3]]


TWICE = [prompt for prompt in PROMPTS for _ in range(2)]


def test_samples_are_those_of_copies_of_the_prompt(one_device):
    generate, _, _ = one_device
    copies = generate(TWICE, temperature=1.0)
    assert generate(PROMPTS, temperature=1.0, num_samples=2) == copies
    assert copies[0] != copies[1]


def test_batches_do_not_change_a_sample(one_device):
    generate, generator, params = one_device
    found = generator.generate_batches(params, TWICE, options_of(temperature=1.0), 3)
    assert [samples[0] for samples in found] == generate(TWICE, temperature=1.0)


def test_truncation_never_draws_what_it_leaves_out(one_device):
    generate, _, _ = one_device

    def tokens(**options):
        return [one.tokens for one in generate(PROMPTS, **options)]

    assert tokens(temperature=3.0, top_k=1, logprobs=3) == tokens()
    assert tokens(temperature=3.0, top_k=2, logprobs=3) != tokens()


def test_logprobs_are_those_of_whole_forward_passes(one_device):
    generate, _, params = one_device
    uncached = Uncached(tiny.blueprint_of(MODEL, tiny.mesh_of(1, 1, 1)), params)
    found = generate(PROMPTS, temperature=2.0, top_k=40, logprobs=3)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        row = np.zeros((1, 16), np.int64)
        row[0, : len(prompt) + NEW] = [*prompt, *continuation.tokens]
        expected = log_softmax(uncached.logits(row)[0])[len(prompt) - 1 : len(prompt) + NEW - 1]
        assert continuation.logprobs is not None
        assert [one.token for one in continuation.logprobs] == continuation.tokens
        chosen = [one.logprob for one in continuation.logprobs]
        np.testing.assert_allclose(chosen, expected[np.arange(NEW), continuation.tokens], atol=1e-4)
        best = np.argsort(-expected, axis=-1)[:, :3]
        assert [[token for token, _ in one.best] for one in continuation.logprobs] == best.tolist()
        logprobs = [[logprob for _, logprob in one.best] for one in continuation.logprobs]
        np.testing.assert_allclose(logprobs, np.take_along_axis(expected, best, -1), atol=1e-4)
    assert found == generate(PROMPTS, temperature=2.0, top_k=40, logprobs=3)
    assert generate(PROMPTS)[0].logprobs is None


def test_a_stop_string_ends_its_row_alone(one_device, monkeypatch):
    monkeypatch.setattr(decode, "STEPS_PER_LOOK", 3)
    generate, _, _ = one_device
    plain = generate(PROMPTS)
    stop = plain[0].text[3:5]  # of two tokens, in two looks
    assert all(stop not in one.text for one in plain[1:])
    first, *others = generate(PROMPTS, stop=(stop, "never"))
    assert first.text == plain[0].text[: plain[0].text.index(stop)]
    assert first.finish_reason == "stop"
    assert first.tokens == plain[0].tokens[: len(first.text) + 2]
    assert others == plain[1:]


def test_streamed_pieces_are_the_text(one_device):
    _, generator, params = one_device
    pieces: dict[tuple[int, int], list[str]] = {}

    def on_text(prompt: int, sample: int, piece: str) -> None:
        pieces.setdefault((prompt, sample), []).append(piece)

    options = options_of(temperature=1.0, num_samples=2)
    found = generator.generate(params, PROMPTS, options, on_text)
    assert found == generator.generate(params, PROMPTS, options)
    assert {at: "".join(parts) for at, parts in pieces.items()} == {
        (prompt, sample): one.text for prompt, samples in enumerate(found) for sample, one in enumerate(samples)
    }
    assert max(map(len, pieces.values())) > 1


def test_fewer_tokens_are_the_beginning_of_more(one_device):
    generate, _, _ = one_device
    longer, shorter = generate(PROMPTS, max_tokens=NEW + 5), generate(PROMPTS)
    assert [continuation.tokens[:NEW] for continuation in longer] == [continuation.tokens for continuation in shorter]
    assert {len(continuation.tokens) for continuation in longer} == {NEW + 5}


def test_a_text_ends_where_the_model_ends_it(one_device, seed):
    endless = one_device[0](PROMPTS)
    ending = next(token for token in endless[0].tokens if token not in endless[1].tokens)
    tokenizer = Letters()
    tokenizer.eos_id = ending
    generate, _, _ = generator_on((1, 1, 1), np.random.default_rng(seed), tokenizer)
    first, second, _ = generate(PROMPTS)
    assert first.finish_reason == "eos"
    assert first.text == Letters().decode(first.tokens)
    assert first.tokens == endless[0].tokens[: endless[0].tokens.index(ending)]
    assert second == endless[1]


def test_texts_are_continued_without_the_prompt(one_device):
    generate, generator, params = one_device
    assert generator.encode("cd") == PROMPTS[0]
    texts = generator.generate_texts(params, ["cd", "efghij", ""], options_of())
    assert texts == [Letters().decode(continuation.tokens) for continuation in generate(PROMPTS)]
    assert all(texts)


@pytest.mark.fast
def test_what_cannot_be_continued_is_refused(rng):
    blueprint = tiny.blueprint_of(MODEL, tiny.mesh_of(1, 1, 1))
    generator = Generator(blueprint, tiny.FLOAT32, Letters())

    def refused(message, prompt=PROMPTS[1], **options):
        with pytest.raises(InputError, match=message):
            generator.generate(None, [prompt], options_of(**options))

    refused(r"7 tokens and 26 new ones make 33, but model.max_length is 32.*at most 25 new", max_tokens=26)
    refused("top_k is 91, but the vocabulary has 90 tokens", temperature=1.0, top_k=91)
    with pytest.raises(InputError, match="9 tokens and 24 new ones"):  # before the first batch
        generator.generate_batches(None, [[1], [1] * 9], options_of(max_tokens=24), 1)
    assert generator.generate(None, [], options_of()) == []
    beginningless = Letters()
    beginningless.bos_id = None
    with pytest.raises(InputError, match="a prompt is empty"):
        Generator(blueprint, tiny.FLOAT32, beginningless).encode("")


@pytest.mark.slow
def test_greedy_equals_transformers(rng):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.models.llama_of_transformers import as_transformers

    config = tiny.with_changes(tiny.CONFIG, num_kv_heads=2, max_length=32)
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    arrays, params = parameters(blueprint, rng)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_length,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    )
    tensors = as_transformers(config, arrays)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()})
    generator = Generator(blueprint, tiny.FLOAT32, Endless())
    found = [samples[0] for samples in generator.generate(params, PROMPTS, options_of())]
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert continuation.tokens == theirs[0, len(prompt) :].tolist()

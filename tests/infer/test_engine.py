"""Generation against the full forward pass and against transformers, and its own laws."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import ConfigError
from jaxtune.infer import Sampling, batching, engine, generate, make_sampling
from jaxtune.sharding import rules
from jaxtune.sharding.mesh import make_mesh
from tests import oracle

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GREEDY = Sampling()
DRAWN = make_sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2)
PROMPTS = [oracle.random_tokens(i, n).tolist() for i, n in enumerate((3, 17, 9, 1, 30))]


@pytest.fixture(scope="module", params=["scan", "unroll"])
def loaded(request: pytest.FixtureRequest) -> oracle.Loaded:
    pytest.importorskip("torch")
    return oracle.load(oracle.checkpoint_of(oracle.hf_llama()), layers=request.param)


@pytest.fixture(scope="module")
def unrolled() -> oracle.Loaded:
    return oracle.load(open_checkpoint("tiny:llama"), layers="unroll")


def run(loaded: oracle.Loaded, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 12, "eos_ids": (), "sampling": GREEDY} | options
    return generate(loaded.skeleton, loaded.params, prompts, **options)


def test_cached_decode_is_the_full_forward(loaded: oracle.Loaded) -> None:
    """Each greedy token is the likeliest one of a forward pass over all tokens before it."""
    for prompt, new in zip(PROMPTS, run(loaded, PROMPTS), strict=True):
        tokens = np.array([prompt + new], np.int32)
        likeliest = oracle.logits(loaded, tokens)[0, len(prompt) - 1 : -1].argmax(-1)
        assert new == likeliest.tolist()


def test_logits_of_pieces_and_steps_are_those_of_the_full_forward(loaded: oracle.Loaded) -> None:
    program = engine._Program(loaded.skeleton, None)
    tokens = oracle.random_tokens(7, 3, 24)
    pad = np.array([0, 5, 11], np.int32)
    cache = engine._cache_maker(program, 3, 32)()
    for start, end in ((0, 16), (16, 23), (23, 24)):
        logits, cache = engine._read(program, loaded.params, cache, tokens[:, start:end], pad)
        for row in range(3):
            expected = oracle.logits(loaded, tokens[row : row + 1, pad[row] : end])[0, -1]
            assert oracle.difference(logits[row], expected) < 5e-6


def test_greedy_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    model = oracle.hf_llama(seed=3)
    loaded = oracle.load(oracle.checkpoint_of(model), layers="scan")
    prompts = [oracle.random_tokens(i, n).tolist() for i, n in enumerate((4, 13, 26))]
    for prompt, new in zip(prompts, run(loaded, prompts, max_new_tokens=32), strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert new == expected[0, len(prompt) :].tolist()


def test_penalized_greedy_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    model = oracle.hf_llama(seed=4)
    loaded = oracle.load(oracle.checkpoint_of(model), layers="unroll")
    prompt = oracle.random_tokens(5, 20).tolist()
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        do_sample=False,
        repetition_penalty=1.5,
        eos_token_id=None,
        pad_token_id=0,
    )
    sampling = make_sampling(repetition_penalty=1.5)
    (new,) = run(loaded, [prompt], max_new_tokens=32, sampling=sampling)
    assert new == expected[0, 20:].tolist()


def test_answers_do_not_depend_on_the_batch(
    unrolled: oracle.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = run(unrolled, PROMPTS, sampling=DRAWN, seed=5)
    assert together[:2] == run(unrolled, PROMPTS[:2], sampling=DRAWN, seed=5)
    monkeypatch.setattr(batching, "MAX_ROWS", 2)
    assert together == run(unrolled, PROMPTS, sampling=DRAWN, seed=5)


def test_the_seed_decides(unrolled: oracle.Loaded) -> None:
    first = run(unrolled, PROMPTS, sampling=DRAWN, seed=1)
    assert first == run(unrolled, PROMPTS, sampling=DRAWN, seed=1)
    assert first != run(unrolled, PROMPTS, sampling=DRAWN, seed=2)
    same = run(unrolled, [PROMPTS[0]] * 3, sampling=DRAWN, seed=1)
    assert len({tuple(new) for new in same}) == 3  # equal prompts draw for themselves


def test_eos_ends_a_row_and_is_not_returned(unrolled: oracle.Loaded) -> None:
    free = run(unrolled, PROMPTS)
    eos = free[1][4]
    ended = run(unrolled, PROMPTS, eos_ids=(eos,))
    for new, whole in zip(ended, free, strict=True):
        assert new == (whole[: whole.index(eos)] if eos in whole else whole)


def test_the_limit_is_exact(unrolled: oracle.Loaded) -> None:
    assert [len(new) for new in run(unrolled, PROMPTS, max_new_tokens=5)] == [5] * 5


def test_answers_end_where_positions_end(unrolled: oracle.Loaded) -> None:
    prompts = [[1] * 505, [1] * 2]
    assert [len(new) for new in run(unrolled, prompts, max_new_tokens=20)] == [7, 20]


def test_a_prompt_in_several_pieces(
    unrolled: oracle.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [oracle.random_tokens(1, 90).tolist(), oracle.random_tokens(2, 40).tolist()]
    whole = run(unrolled, prompts)
    monkeypatch.setattr(engine, "PIECE", 32)
    assert run(unrolled, prompts) == whole


def test_a_watcher_sees_growing_answers_and_can_end_them(unrolled: oracle.Loaded) -> None:
    free = run(unrolled, PROMPTS, max_new_tokens=30)
    looks: list[tuple[int, list[int]]] = []

    def watch(i: int, new: list[int]) -> bool:
        looks.append((i, new))
        return i == 1 and len(new) > 5

    watched = run(unrolled, PROMPTS, max_new_tokens=30, watch=watch)
    for i in (0, 2, 3, 4):
        assert watched[i] == free[i]
        seen = [new for j, new in looks if j == i]
        assert [len(new) for new in seen] == [1, 9, 17, 25, 30] and seen[-1] == free[i]
    assert watched[1] == free[1][:9]


def test_no_prompts_no_answers(unrolled: oracle.Loaded) -> None:
    assert run(unrolled, []) == []


def test_programs_are_kept_for_the_next_call(unrolled: oracle.Loaded) -> None:
    run(unrolled, PROMPTS)
    compiled = engine._decode._cache_size()
    live = {name: leaf + 0 for name, leaf in unrolled.params.items()}
    generate(unrolled.skeleton, live, PROMPTS[::-1], max_new_tokens=12, eos_ids=(), sampling=GREEDY)
    assert engine._decode._cache_size() == compiled


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1"), ([[500]], "outside"), ([[-1]], "outside"), ([[1] * 512], "512")],
)
def test_prompts_that_cannot_be_read_are_refused(
    unrolled: oracle.Loaded, prompts: list, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(unrolled, prompts)


def test_eight_devices_answer_like_one() -> None:
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 (simulated) devices")
    loaded = oracle.load(open_checkpoint("tiny:llama"), layers="scan")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spread = {
        name: jax.device_put(
            leaf, rules.sharding(leaf.shape, loaded.skeleton.axes(name), mesh, name)
        )
        for name, leaf in loaded.params.items()
    }
    options = {"max_new_tokens": 10, "eos_ids": (), "sampling": GREEDY}
    assert generate(loaded.skeleton, spread, PROMPTS, **options) == run(
        loaded, PROMPTS, max_new_tokens=10
    )


def test_lengths_are_rounded_to_few_sizes() -> None:
    sizes = {batching.rounded_length(n) for n in range(1, 1025)}
    assert len(sizes) == 15 and max(sizes) == 1024
    assert all(n <= batching.rounded_length(n) < n + batching.PIECE for n in range(1, 2000))

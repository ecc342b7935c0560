"""Requests that share work in prefix trees are scored as if each were alone; and how trees and rows are made."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from helpers.families import CASES, ORIGINAL, VOCAB, WINDOW, torch_model
from helpers.models import load, mesh_of
from mice_jax.evals import loglikelihood, prefix_tree
from mice_jax.evals.loglikelihood import Scorer
from mice_jax.evals.prefix_tree import Request, Tree
from mice_jax.models.attention import tree as tree_attention

# Sums of up to 40 log-probabilities of order 10, each with some hundred float32 roundings of attention scores that
# these weights make large: 1e-4 was seen. The contract is 1e-3.
CLOSE = 5e-4

pytestmark = pytest.mark.usefixtures("one_thread")


def request(ids: list[int], count: int) -> Request:
    """A request of which the last `count` of the ids are scored."""
    whole = np.array(ids, np.int32)
    return Request(whole[:-1], whole[len(ids) - count :])


def questions(lengths: tuple[int, ...], seed: int = 0, preamble: int = 0) -> list[Request]:
    """Four options to each of questions of so many tokens, which may all begin with the same examples."""
    rng = np.random.default_rng(seed)
    before, found = rng.integers(0, VOCAB, preamble).tolist(), []
    for length in lengths:
        context = before + rng.integers(0, VOCAB, length).tolist()
        common = rng.integers(0, VOCAB, 2).tolist()
        options = [rng.integers(0, VOCAB, n).tolist() for n in (1, 3, 6)] + [[*common, 5]]
        options.append([*common, 9, 11])  # shares what the one before it begins with
        found += [request(context + option, len(option)) for option in options]
    return found


def alone(model: Any, requests: list[Request]) -> list[tuple[float, bool]]:
    """What torch makes of each request for itself."""
    scores = []
    for r in requests:
        with torch.no_grad():
            logits = model(torch.tensor(r.ids)[None].long()).logits[0, -len(r.targets) :].double()
        targets = torch.tensor(r.targets).long()
        logprobs = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
        scores.append((float(logprobs.sum()), bool((logits.argmax(-1) == targets).all())))
    return scores


def with_greedy(model: Any, requests: list[Request]) -> list[Request]:
    """One more option to the last question: what the model itself would say."""
    ids = requests[-1].ids[: -len(requests[-1].targets) + 1].tolist()
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return [*requests, request(ids, 4)]


def worst(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> float:
    return max(abs(f[0] - w[0]) for f, w in zip(found, wanted, strict=True))


# Questions within the window and past it, past where RoPE was scaled and past phi3's window; one that is alone.
LENGTHS = (3, WINDOW - 2, 2 * WINDOW, ORIGINAL - 3, 230)


# test_families covers the variants and families that are left out; scoring depends on them by positions alone.
LEFT_OUT = {
    "llama-linear", "mistral-full", "phi3-mini", "granite", "granite4", "olmo2", "olmo3", "exaone4", "hunyuan", "qwen2",
    "qwen3", "granite4-hybrid", "qwen3_5",
}  # fmt: skip


# Windows and several RoPEs are in mistral, smollm3 and gemma4 too; a cap does not depend on positions.
SLOW = {"gemma2", "gemma3", "gemma4-keys"}
SCORED = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else []) for case in CASES if case not in LEFT_OUT]


@pytest.mark.parametrize("case", SCORED)
def test_shared_questions_score_as_torch_one_by_one(case: str, tmp_path: Path) -> None:
    model = torch_model(case, tmp_path)
    requests = with_greedy(model, questions(LENGTHS) + questions((20, 30, 10), preamble=150, seed=1))
    requests += questions((60,), seed=2)[:1]
    decoder, params = load(tmp_path, mesh_of(1, 1, 1))
    found, wanted = Scorer(decoder, mesh_of(1, 1, 1), "float32").score(params, requests), alone(model, requests)
    assert worst(found, wanted) < CLOSE
    assert [f[1] for f in found] == [w[1] for w in wanted]
    assert any(w[1] for w in wanted)
    # The trees do share: far fewer tokens are computed than the requests have. A recurrent state cannot be shared.
    grown = prefix_tree.build_prefix_trees(requests, loglikelihood._tree_groups(requests, decoder.spec))
    computed = sum(len(t.tokens) for t in grown) / sum(len(r.ids) for r in requests)
    assert computed == 1 if decoder.spec.is_recurrent else computed < 0.4


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mistral")
    model = torch_model("mistral", folder)
    requests = questions(LENGTHS)
    return folder, requests, alone(model, requests)


def test_wrong_branch_masks_or_positions_change_scores(mistral: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: each is far from what torch says."""
    folder, requests, wanted = mistral
    decoder, params = load(folder, mesh_of(1, 1, 1))

    def gap_with(change: Any) -> float:
        made = prefix_tree.arrays

        def changed(*args: Any) -> Any:
            arrays, owners = made(*args)
            change(arrays)
            return arrays, owners

        with monkeypatch.context() as patched:
            patched.setattr(prefix_tree, "arrays", changed)
            return worst(Scorer(decoder, mesh_of(1, 1, 1), "float32").score(params, requests), wanted)

    def see_each_other(arrays: Any) -> None:
        arrays["reach"][arrays["reach"] > 0] = 10**6

    def stand_elsewhere(arrays: Any) -> None:
        arrays["positions"][:, arrays["segment_ids"].shape[1] :] += 1

    assert gap_with(lambda arrays: None) < CLOSE
    assert gap_with(see_each_other) > 100 * CLOSE
    assert gap_with(stand_elsewhere) > 100 * CLOSE

    def without_window(q: Any, k: Any, v: Any, forest: Any, scoring: Any, *, backend: str) -> Any:
        wide = tree_attention.Scoring(scoring.scale, None, scoring.softcap)
        both = [attend_branched(q, k, v, forest, s, backend=backend) for s in (scoring, wide)]
        trunks = forest.segment_ids.shape[1]
        return jax.numpy.concatenate([both[0][:, :trunks], both[1][:, trunks:]], axis=1)

    attend_branched = tree_attention.attend_branched
    monkeypatch.setattr("mice_jax.models.transformer.attend_branched", without_window)
    monkeypatch.setattr(loglikelihood, "shared_score", loglikelihood.shared_score.__wrapped__)  # it is traced again
    assert gap_with(lambda arrays: None) > 100 * CLOSE


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (2, 2, 1, 2)], ids=str)
def test_scores_are_the_same_on_any_mesh(mistral: Any, sizes: tuple[int, int, int, int]) -> None:
    folder, requests, wanted = mistral
    mesh = mesh_of(*sizes[:3], sequence=sizes[3])
    decoder, params = load(folder, mesh)
    assert worst(Scorer(decoder, mesh, "float32").score(params, requests), wanted) < CLOSE


def test_progress_counts_every_request(mistral: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, requests, _ = mistral
    monkeypatch.setattr(loglikelihood, "CPU_SLOTS", 1)
    monkeypatch.setattr(prefix_tree, "MIN_ROW_SLOTS", 128)
    monkeypatch.setattr(prefix_tree, "MAX_ROW_SLOTS", 128)
    decoder, params = load(folder, mesh_of(1, 1, 1))
    told: list[int] = []
    Scorer(decoder, mesh_of(1, 1, 1), "float32").score(params, requests, told.append)
    assert told == sorted(told) and len(told) > 1 and told[-1] == len(requests)


# ---------------------------------------------------------------------------------------- trees
def texts_of(tree: Tree, requests: list[Request]) -> dict[int, list[int]]:
    """Each request's ids, read back from the ancestors of the last node that it scores."""
    found = {}
    for i, nodes in tree.scored:
        last = nodes[-1]
        numbers = np.arange(len(tree.tokens))
        path = numbers[(numbers <= last) & (last < tree.subtree_end)]
        assert tree.positions[path].tolist() == list(range(len(path)))
        assert path[len(path) - len(nodes) :].tolist() == nodes.tolist()
        found[i] = tree.tokens[path].tolist()
    return found


@pytest.mark.parametrize("seed", range(5))
def test_ancestors_of_scored_tokens_are_the_request(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Over three tokens texts part everywhere, are each other's beginnings, and come twice.
    requests = [request(rng.integers(0, 3, rng.integers(2, 12)).tolist(), 1) for _ in range(60)]
    found: dict[int, list[int]] = {}
    grown = prefix_tree.build_prefix_trees(requests)
    for tree in grown:
        found |= texts_of(tree, requests)
        assert tree.trunk <= len(tree.tokens)
    assert found == {i: r.ids.tolist() for i, r in enumerate(requests)}
    distinct = {tuple(r.ids[: n + 1]) for r in requests for n in range(len(r.ids))}
    assert sum(len(t.tokens) for t in grown) < 1.2 * len(distinct)


def test_tree_branches_are_bounded_and_unlike_texts_are_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_tree, "MAX_BRANCH_SLOTS", 40)
    requests = questions((10,) * 8, preamble=20)
    grown = prefix_tree.build_prefix_trees(requests)
    assert len(grown) > 2 and max(t.branches for t in grown) <= 40
    apart = [request([1, *np.random.default_rng(i).integers(2, 50, 9).tolist()], 1) for i in range(5)]
    assert [t.branches for t in prefix_tree.build_prefix_trees(apart)] == [0] * 5
    assert prefix_tree.build_prefix_trees([]) == []
    assert len(prefix_tree.build_prefix_trees([apart[0]] * 2, [0, 1])) == 2
    assert len(prefix_tree.build_prefix_trees([apart[0]] * 2, [0, 0])) == 1


def test_rows_have_every_tree_once_and_fit_their_shape() -> None:
    requests = questions(tuple(range(5, 200, 3)))
    grown = prefix_tree.build_prefix_trees(requests)
    shape, rows = prefix_tree.pack(grown)
    assert sorted(id(t) for row in rows for t in row) == sorted(map(id, grown))
    for row in rows:
        assert sum(t.trunk for t in row) <= shape.trunks and sum(t.branches for t in row) <= shape.branches
        assert sum(t.num_scored for t in row) <= shape.scored
    used = sum(len(t.tokens) for t in grown)
    assert used > 0.6 * len(rows) * (shape.trunks + shape.branches)
    # Texts of 400 tokens fill long rows better than short ones, and a few short texts take no long row.
    shape, rows = prefix_tree.pack(prefix_tree.build_prefix_trees(questions((400,) * 30)))
    assert shape.trunks == 2048 and len(rows) == 6
    assert prefix_tree.pack(prefix_tree.build_prefix_trees(questions((20,) * 5)))[0].trunks == 128
    assert [prefix_tree.rounded_up(n) for n in (1, 128, 129, 257, 385, 513, 769, 1025, 1537)] == [
        128, 128, 256, 384, 512, 768, 1024, 1536, 2048,
    ]  # fmt: skip

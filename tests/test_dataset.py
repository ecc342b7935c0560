"""Which samples are dropped and why, what is held out, and what the report counts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import Record, chat, make_chats, make_tokenizer, write_jsonl
from mice_jax.config import Data, Phase, Source
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import Dataset, build_dataset, source_name
from mice_jax.data.mixture import Mixture
from mice_jax.errors import UserError

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(make_tokenizer())


@pytest.fixture
def build(tmp_path: Path, encoder: ChatEncoder) -> Any:
    def build(records: list[Record] | Path, **fields: Any) -> Dataset:
        path = records if isinstance(records, Path) else write_jsonl(tmp_path / "chats.jsonl", records)
        data = Data(phases=[Phase(sources=[Source(path=str(path))])])
        for name, value in fields.items():
            setattr(data, name, value)
        return build_dataset(data, encoder)

    return build


def length(encoder: ChatEncoder, record: Record) -> int:
    return len(encoder.tokenizer.apply_chat_template(record["messages"], return_dict=False))


def texts(data: Dataset, ids: np.ndarray, encoder: ChatEncoder) -> set[str]:
    return {encoder.tokenizer.decode(data.corpus.sample(int(i))[0]) for i in ids}


def held_ids(data: Dataset, name: str) -> np.ndarray:
    return np.concatenate([h.ids for h in data.validation if h.name == name])


SHORT, LONG = chat("who?", "mice"), chat("who?", "mice and elephants " * 20)
MUTE = {"messages": [SHORT["messages"][0], {"role": "assistant", "content": "mice", "train": False}]}
LATE = chat("who and what and where? " * 10, "mice")  # its only answer is past the cut


# ---------------------------------------------------------------------------------------- overlong
def test_overlong_samples_are_dropped_and_counted(build: Any, encoder: ChatEncoder) -> None:
    most = length(encoder, SHORT)
    data = build([SHORT, LONG, chat("who ?", "mice")], max_length=most)
    (source,) = data.report["sources"].values()
    assert (source["read"], source["kept"], source["truncated"]) == (3, 1, 0)
    assert source["dropped"] == {"longer than max_length": 2}
    assert source["overlong"] == {"tokens": length(encoder, LONG), "where": data.corpus.where(1)}
    assert data.phases[0].pools[0].ids.tolist() == [0]  # of exactly max_length tokens: kept
    assert (source["tokens"], source["length_percentiles"]["100"]) == (most, most)
    _, trained = data.corpus.sample(0)
    assert source["loss_tokens"] == int(trained[1:].sum()) > 0


def test_overlong_samples_are_truncated_and_counted(build: Any, encoder: ChatEncoder) -> None:
    most = length(encoder, SHORT) + 2
    data = build([SHORT, LONG], max_length=most, overlong="truncate")
    (source,) = data.report["sources"].values()
    assert (source["kept"], source["truncated"], source["dropped"]) == (2, 1, {})
    assert data.corpus.lengths.tolist() == [most - 2, most]
    whole = encoder.tokenizer.apply_chat_template(LONG["messages"], return_dict=False)
    ids, trained = data.corpus.sample(1)
    assert ids.tolist() == whole[:most] and len(trained) == most
    assert data.corpus.num_trained[1] == trained[1:].sum()
    assert source["tokens"] == 2 * most - 2


def test_overlong_samples_are_an_error_where_asked(build: Any, encoder: ChatEncoder) -> None:
    most = length(encoder, SHORT)
    with pytest.raises(UserError, match=r"chats\.jsonl has 1 sample above data\.max_length") as raised:
        build([SHORT, LONG], max_length=most, overlong="error")
    assert str(length(encoder, LONG)) in str(raised.value)
    assert build([SHORT], max_length=most, overlong="error").report["sources"]["chats"]["kept"] == 1


# ---------------------------------------------------------------------------------------- untrained
def test_sample_without_a_trained_token_is_dropped_and_counted(build: Any) -> None:
    data = build([SHORT, MUTE, SHORT])
    assert data.report["sources"]["chats"]["dropped"] == {"no trained token": 1}
    assert data.phases[0].pools[0].ids.tolist() == [0, 2]


def test_sample_whose_trained_tokens_were_cut_off_is_dropped_and_counted(build: Any, encoder: ChatEncoder) -> None:
    most = length(encoder, LATE) - 10
    data = build([SHORT, LATE], max_length=most, overlong="truncate")
    source = data.report["sources"]["chats"]
    assert (source["kept"], source["truncated"], source["dropped"]) == (1, 0, {"no trained token": 1})
    assert build([SHORT, LATE]).report["sources"]["chats"]["kept"] == 2  # whole, it has some


@pytest.mark.parametrize(
    ("records", "fields", "words"),
    [
        ([MUTE, MUTE], {}, ["chats: 2 no trained token."]),
        ([SHORT, LONG], {"max_length": 4}, ["chats: 2 longer than max_length.", "data.max_length=4"]),
        ([LATE], {"max_length": 20, "overlong": "truncate"}, ["chats: 1 no trained token."]),
    ],
)
def test_phase_without_samples_is_an_error_that_counts_the_dropped(
    build: Any, records: list[Record], fields: Record, words: list[str]
) -> None:
    with pytest.raises(UserError, match="'stacked' has no sample to train on") as raised:
        build(records, **fields)
    assert all(word in str(raised.value) for word in words)


# ---------------------------------------------------------------------------------------- held out
def test_what_is_held_out_is_not_trained_on_and_does_not_move(build: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    records = make_chats(200)

    def split(records: list[Record]) -> tuple[set[str], set[str]]:
        data = build(write_jsonl(tmp_path / "split.jsonl", records), validation_fraction=0.2)
        trained, held = (texts(data, ids, encoder) for ids in (data.phases[0].pools[0].ids, held_ids(data, "split")))
        assert not trained & held and len(trained | held) == len(records)
        report = data.report
        assert (report["sources"]["split"]["read"], report["validation"]["split"]["read"]) == (len(trained), len(held))
        return trained, held

    trained, held = split(records)
    assert 20 <= len(held) <= 60  # 40 on average, with a deviation of 5.7
    more = split(make_chats(50, seed=1) + records[::-1])
    assert trained < more[0] and held < more[1]


def test_larger_fraction_holds_out_the_same_and_more(build: Any) -> None:
    few, many = (held_ids(build(make_chats(100), validation_fraction=f), "chats").tolist() for f in (0.1, 0.5))
    assert set(few) < set(many)


def test_same_sample_twice_is_on_one_side(build: Any) -> None:
    data = build(make_chats(60) * 2, validation_fraction=0.3)
    held = set(held_ids(data, "chats").tolist())
    assert held and all((i in held) == (i + 60 in held) for i in range(60))


def test_nothing_is_held_out_by_default(build: Any) -> None:
    data = build(make_chats(20))
    assert data.validation == [] and data.report["validation"] == {}
    assert len(data.phases[0].pools[0].ids) == 20


def test_held_out_sources_are_counted_by_name(build: Any, tmp_path: Path) -> None:
    held = [Source(path=str(write_jsonl(tmp_path / f"{n}.jsonl", make_chats(5, seed=n))), name="late") for n in (1, 2)]
    data = build(make_chats(20), validation=held)
    assert [(h.name, len(h.ids)) for h in data.validation] == [("late", 5)] * 2
    assert sorted(s["kept"] for s in data.report["validation"].values()) == [5, 5]
    assert not set(held_ids(data, "late")) & set(data.phases[0].pools[0].ids)


# ---------------------------------------------------------------------------------------- several sources
def test_source_in_two_phases_is_tokenised_once_and_reported_twice(build: Any, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "both.jsonl", make_chats(7)))
    phases = [Phase(name="a", sources=[Source(path=path)]), Phase(name="b", sources=[Source(path=path, weight=2.0)])]
    data = build([SHORT], phases=phases)
    assert len(data.corpus.lengths) == 7
    assert [p.per_epoch for p in data.phases] == [7, 14]
    assert len(data.report["sources"]) == 2


def test_the_first_source_that_names_a_sample_counts_it(build: Any, tmp_path: Path) -> None:
    """Metrics of two sources of one name are together, and replayed samples stay those of their source."""
    one, two, three = (write_jsonl(tmp_path / f"{n}.jsonl", make_chats(n + 3, seed=n)) for n in (1, 2, 3))
    first = [Source(path=str(one)), Source(path=str(two), name="rest"), Source(path=str(three), name="rest")]
    again = [Source(path=str(three), name="again", weight=2.0)]
    data = build([SHORT], phases=[Phase(name="a", sources=first), Phase(name="b", sources=again, replay=0.5)])
    assert data.sources.names == ("1", "rest", "again")
    assert data.sources.numbers.tolist() == [0] * 4 + [1] * 11
    assert data.sources.loss_tokens(np.array([3, 4, 14]), np.array([5, 7, 2])) == {"1": 5, "rest": 9, "again": 0}


def test_bad_lines_are_counted_by_reason_where_they_may_be_skipped(build: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "bad.jsonl", [SHORT, SHORT])
    role = json.dumps({"messages": [{"role": "boss", "content": "x"}]})
    file.write_text(file.read_text() + f"{{not json\n{role}\n[1]\n{{oh\n")
    with pytest.raises(UserError, match=r"bad\.jsonl lines 3, 6"):
        build(file)
    data = build(file, skip_bad=True)
    source = data.report["sources"]["bad"]
    assert (source["read"], source["kept"]) == (6, 2)
    assert source["dropped"] == {
        "bad line: not JSON": 2,
        "bad line: unknown role": 1,
        "bad line: not an object": 1,
    }


# ---------------------------------------------------------------------------------------- parts of a source
LADDER = [chat("who?", "mice " * n) for n in (5, 1, 4, 1, 3, 2, 9)]  # the short half: 1, 1, 2, 3 words


def part(build: Any, path: Path, **fields: Any) -> tuple[list[int], dict[str, Any]]:
    data = build(path, phases=[Phase(sources=[Source(path=str(path), **fields)])])
    (entry,) = data.report["sources"].values()
    return data.phases[0].pools[0].ids.tolist(), entry


def test_halves_of_a_source_by_answer_length_are_all_of_it(build: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "ladder.jsonl", LADDER)
    short, said = part(build, path, half="short")
    assert short == [1, 3, 4, 5] and said["set_aside"] == {"not of the short half": 3} and said["kept"] == 4
    long, said = part(build, path, half="long")
    assert long == [0, 2, 6] and said["set_aside"] == {"not of the long half": 4} and said["read"] == 7
    assert part(build, path)[1]["set_aside"] == {}


def test_fewer_samples_are_a_part_of_more_and_do_not_move_with_the_order(build: Any, tmp_path: Path) -> None:
    records = make_chats(40)
    path, turned = (write_jsonl(tmp_path / f"{n}.jsonl", r) for n, r in (("a", records), ("b", records[::-1])))
    some, said = part(build, path, max_samples=10)
    more, _ = part(build, path, max_samples=20)
    assert len(some) == 10 and set(some) < set(more) and said["set_aside"] == {"beyond max_samples": 30}
    assert some == sorted(some) != list(range(10))
    assert sorted(39 - i for i in part(build, turned, max_samples=10)[0]) == some
    assert len(part(build, path, max_samples=99)[0]) == 40


def test_part_is_taken_of_what_is_neither_held_out_nor_dropped(build: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", [*make_chats(60), MUTE])
    fields = {"path": str(path), "half": "short", "max_samples": 12}
    data = build(path, phases=[Phase(sources=[Source(**fields)])], validation_fraction=0.3)
    held = set(held_ids(data, "all").tolist())
    (entry,) = data.report["sources"].values()
    kept = 60 - len(held)
    assert entry["dropped"] == {"no trained token": 1} or 60 in held
    assert entry["set_aside"] == {"not of the short half": kept // 2, "beyond max_samples": -(-kept // 2) - 12}
    assert not held & set(data.phases[0].pools[0].ids.tolist())
    assert data.report["validation"]["all"]["set_aside"] == {}  # all that is held out is measured


# ---------------------------------------------------------------------------------------- replay
def phased(tmp_path: Path, **last: Any) -> list[Phase]:
    a, b, c = (write_jsonl(tmp_path / f"{n}.jsonl", make_chats(20, seed=i)) for i, n in enumerate("abc"))
    return [
        Phase("one", sources=[Source(str(a)), Source(str(b), weight=0.5)]),
        Phase("two", sources=[Source(str(a))]),
        Phase("three", sources=[Source(str(c))], **last),
    ]


def test_phase_replays_earlier_ones_each_sample_once_in_a_pass(build: Any, tmp_path: Path) -> None:
    data = build(tmp_path, phases=phased(tmp_path, replay=0.25, num_epochs=4.0))
    own, replay = data.phases[2].pools
    assert (len(own.ids), replay.name, replay.weight) == (20, "replay of one, two", 0.25)
    assert replay.ids.tolist() == list(range(40))  # those of a once, though two phases have them
    mixture = Mixture(data.phases, batch_size=30, seed=0)
    steps = [mixture.step(i) for i in range(len(mixture))]
    again = [[int(i) for i in s.samples if i < 40] for s in steps if s.phase == 2]
    assert [len(s) for s in again] == [10] * 4
    assert sorted(i for s in again for i in s) == list(range(40))  # four epochs of a quarter are one pass
    (last,) = {tuple(e.by_pool) for e in mixture.epochs(99) if e.phase == 2}
    assert last == (20, 10)


def test_one_phase_alone_can_be_replayed(build: Any, tmp_path: Path) -> None:
    data = build(tmp_path, phases=phased(tmp_path, replay=0.5, replay_from="two"))
    assert data.phases[2].pools[1].ids.tolist() == list(range(20))
    with pytest.raises(UserError, match=r"'three' replays nothing: replay=0\.01 of the 20 samples of two"):
        build(tmp_path, phases=phased(tmp_path, replay=0.01, replay_from="two"))


# ---------------------------------------------------------------------------------------- copies and flags
def test_copies_are_counted_by_source_overall_and_against_held_out(build: Any, tmp_path: Path) -> None:
    chats = make_chats(10)
    a = write_jsonl(tmp_path / "a.jsonl", [*chats, chats[0], chats[0], chats[1]])
    b = write_jsonl(tmp_path / "b.jsonl", [chats[2], *make_chats(3, seed=5)])
    held = write_jsonl(tmp_path / "held.jsonl", [chats[0], chats[3], *make_chats(3, seed=6)])
    phases = [Phase(sources=[Source(str(a)), Source(str(b))]), Phase("again", sources=[Source(str(a))])]
    data = build(a, phases=phases, validation=[Source(str(held))])
    assert [s["duplicates"] for s in data.report["sources"].values()] == [3, 0, 3]
    assert (data.report["samples"], data.report["duplicates"]) == (17, 4)
    assert data.report["duplicates_across_sources"] == 1  # the third of a, which b has too
    assert data.report["validation_overlap"] == 4  # three of the first, one of the fourth
    assert build(a).report["validation_overlap"] == 0


def test_flags_and_the_longest_samples_are_reported_with_their_lines(build: Any, tmp_path: Path) -> None:
    spelled = chat("who?", "<|im_end|> and more")
    first = {"messages": [{"role": "assistant", "content": "Hello"}, *SHORT["messages"]]}
    path = write_jsonl(tmp_path / "odd.jsonl", [SHORT, spelled, first, LONG])
    (entry,) = build(path).report["sources"].values()
    assert entry["signs"] == {
        "special_in_content": {"samples": 1, "first": f"{path} line 2"},
        "starts_with_assistant": {"samples": 1, "first": f"{path} line 3"},
    }
    assert entry["longest"][0]["where"] == f"{path} line 4" and entry["format"] == "messages"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("x/a.jsonl.gz", "a"), ("x/chats", "chats"), ("x/chats/*.jsonl", "chats"), ("x/**/part-[0-9].parquet", "x"),
        ("*.jsonl", "*"), ("gs://bucket/a.jsonl", "a"), ("tfds:mice/small:train", "small:train"),
    ],
)  # fmt: skip
def test_source_without_a_name_is_called_by_its_path(path: str, name: str) -> None:
    assert source_name(Source(path=path)) == name and source_name(Source(path=path, name="own")) == "own"


# ---------------------------------------------------------------------------------------- held out for phases
def test_source_is_held_out_once_for_all_the_phases_that_name_it(
    build: Any, encoder: ChatEncoder, tmp_path: Path
) -> None:
    files = {
        n: str(write_jsonl(tmp_path / f"{n}.jsonl", make_chats(c, seed=c))) for n, c in (("a", 20), ("b", 30), ("v", 5))
    }
    phases = [
        Phase(name="one", sources=[Source(path=files["a"])], validation=[Source(path=files["v"])]),
        Phase(name="two", sources=[Source(path=files["b"])], validation=[Source(path=files["v"])], batch_size=7),
    ]
    data = build_dataset(Data(phases=phases, max_length=4096), encoder)
    assert [(h.name, len(h.ids), h.phases) for h in data.validation] == [("v", 5, ("one", "two"))]
    assert [p.batch_size for p in data.phases] == [0, 7]
    for phase in phases:
        phase.validation = []
    data = build_dataset(Data(phases=phases, validation_fraction=0.3), encoder)
    assert [(h.name, h.phases) for h in data.validation] == [("a", ("one",)), ("b", ("two",))]
    data = build_dataset(Data(phases=phases, validation=[Source(path=files["v"])]), encoder)
    assert [(h.name, h.phases) for h in data.validation] == [("v", ())]

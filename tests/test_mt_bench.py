"""MT-Bench with made-up questions, judged by a real HTTP server on loopback: slow, wrong or busy, as tests want."""

import dataclasses
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from helpers.models import llama, load, mesh_of
from helpers.runs import make_tokenizer, run_verb, write_jsonl
from mice_jax import evaluate, generate
from mice_jax.data.chat import ChatEncoder
from mice_jax.errors import UserError
from mice_jax.evals import mt_bench
from mice_jax.evals.judge import Judge, Unusable, make_judge, score_of
from mice_jax.evals.mt_bench import Settings, read_prompts, read_questions, run
from mice_jax.inference.chat import ChatModel, Completion, Message
from mice_jax.inference.generation_config import GenerationDefaults
from mice_jax.inference.sampler import Sampler, Sampling

KEY = "sk-squeak-12345"
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "writing", "turns": ["Praise {cheese}.", "Shorter."]},
    {"question_id": 2, "category": "math", "turns": ["Two mice and two?", "And two?"], "reference": ["R4", "R6"]},
    {"question_id": 3, "category": "stem", "turns": ["Why do mice run?", "And elephants?"]},
]
PROMPTS = [
    {"name": "pair-v2", "system_prompt": "s", "prompt_template": "{unused}"},
    {"name": "single-v1", "system_prompt": "Be fair.", "prompt_template": "Q {question} A {answer} [[rating]]"},
    {
        "name": "single-v1-multi-turn",
        "system_prompt": "Be fair twice.",
        "prompt_template": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    },
    {
        "name": "single-math-v1",
        "system_prompt": "Compare.",
        "prompt_template": "Q {question} A {answer} R {ref_answer_1}",
    },
    {
        "name": "single-math-v1-multi-turn",
        "system_prompt": "Compare twice.",
        "prompt_template": "Q {question_1} A {answer_1} R {ref_answer_1} Q {question_2} A {answer_2} R {ref_answer_2}",
    },
]


# ---------------------------------------------------------------------------------------- a judge
class Reply(NamedTuple):
    body: bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    delay_s: float = 0.0


def says(text: Any) -> Reply:
    return Reply(json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


class Server:
    """What it is asked, and how it replies: by the question and by how often that was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.times: dict[str, list[float]] = {}  # when, by the last message
        self.reply: Callable[[str, int], Reply] = lambda prompt, nth: says("Good. [[7]]")
        self.judges: Callable[[dict[str, Any]], Reply] | None = None  # of a whole request; goes before `reply`
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with lock:
                    key = self.headers.get("Authorization")
                    outer.asked.append({"path": self.path, "key": key, **body})
                    times = outer.times.setdefault(prompt, [])
                    times.append(time.monotonic())
                    nth = len(times)
                reply = outer.judges(body) if outer.judges else outer.reply(prompt, nth)
                time.sleep(reply.delay_s)
                try:
                    self.send_response(reply.status)
                    for name, value in (("Content-Length", str(len(reply.body))), *reply.headers):
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(reply.body)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it waited longer than who asked

            def log_message(self, *args: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()

    def judge(self, **changes: Any) -> Judge:
        patience = {"timeout_s": 0.5, "retries": 3, "backoff_s": 0.01}
        return make_judge(self.url, "judge-1", "MICE_JUDGE_KEY", **(patience | changes))

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MICE_JUDGE_KEY", KEY)
    made = Server()
    yield made
    made.close()


# ---------------------------------------------------------------------------------------- who answers
class Answerer:
    """Says which question it was asked, in which turn, at which temperature."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], float, int, int]] = []

    def __call__(
        self, conversations: Sequence[list[Message]], sampling: Sampling, numbers: Sequence[int]
    ) -> Iterator[Completion | None]:
        for messages, number in zip(conversations, numbers, strict=True):
            self.asked.append((messages, sampling.temperature, sampling.seed, number))
            yield Completion(f"answer {len(messages)} at {sampling.temperature}", True)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    questions = write_jsonl(tmp_path / "question.jsonl", QUESTIONS)
    return questions, write_jsonl(tmp_path / "judge_prompts.jsonl", PROMPTS)


def settings(server: Server, files: tuple[Path, Path], repeats: int = 1, **changes: Any) -> Settings:
    return Settings(server.judge(**changes), read_questions(files[0]), read_prompts(files[1]), repeats)


def score_in(prompt: str) -> float:
    """What the server finds: by the question, and 2 less for a second turn."""
    by_question = {"cheese": 9.5, "Two mice": 6, "mice run": 4}
    return next(s for words, s in by_question.items() if words in prompt) - 2 * (prompt.count("Q ") - 1)


# ---------------------------------------------------------------------------------------- scores
def test_means_by_turn_and_category_and_prompts_follow_the_files(
    server: Server, files: tuple[Path, Path], tmp_path: Path
) -> None:
    server.reply = lambda prompt, nth: says(f"Hm [7]. Rating: [[{score_in(prompt):g}]]")
    answerer, told = Answerer(), []
    found = run(settings(server, files), answerer, "m", tmp_path / "k.jsonl", lambda *x: told.append(x))
    # By hand: 9.5, 7.5; 6, 4; 4, 2.
    assert found["score"] == pytest.approx(33 / 6)
    assert (found["turn_1"], found["turn_2"]) == (pytest.approx(6.5), pytest.approx(4.5))
    assert found["by_category"] == {"math": 5, "stem": 3, "writing": 8.5}
    assert (found["judgements"], found["failed"], found["unanswered"], found["cut"]) == (6, 0, 0, 0)
    assert found["repeats"] == [found["score"]] and found["spread"] is None
    assert told[-1] == ("judging", 6, 6) and ("answering", 6, 6) in told

    assert {(m[0]["content"], t) for m, t, _, _ in answerer.asked} == {
        ("Praise {cheese}.", 0.7), ("Two mice and two?", 0.0), ("Why do mice run?", 0.1),
    }  # fmt: skip
    second = next(m for m, *_ in answerer.asked if len(m) == 3 and "cheese" in m[0]["content"])
    assert [m["content"] for m in second] == ["Praise {cheese}.", "answer 1 at 0.7", "Shorter."]
    prompts = {tuple(m["content"] for m in a["messages"]) for a in server.asked}
    assert prompts == {
        ("Be fair.", "Q Praise {cheese}. A answer 1 at 0.7 [[rating]]"),
        ("Be fair twice.", "Q Praise {cheese}. A answer 1 at 0.7 Q Shorter. A answer 3 at 0.7"),
        ("Compare.", "Q Two mice and two? A answer 1 at 0.0 R R4"),
        ("Compare twice.", "Q Two mice and two? A answer 1 at 0.0 R R4 Q And two? A answer 3 at 0.0 R R6"),
        ("Be fair.", "Q Why do mice run? A answer 1 at 0.1 [[rating]]"),
        ("Be fair twice.", "Q Why do mice run? A answer 1 at 0.1 Q And elephants? A answer 3 at 0.1"),
    }
    assert {(a["path"], a["key"], a["model"], a["temperature"]) for a in server.asked} == {
        ("/v1/chat/completions", f"Bearer {KEY}", "judge-1", 0)
    }


def test_repeats_are_answered_with_seeds_of_their_own_and_have_a_spread(
    server: Server, files: tuple[Path, Path], tmp_path: Path
) -> None:
    server.reply = lambda prompt, nth: says(f"[[{2 * nth}]]")  # the same prompts, so by the repeat's turn to ask
    answerer = Answerer()
    found = run(settings(server, files, repeats=3, parallel=1), answerer, "m", tmp_path / "k.jsonl")
    assert {seed for *_, seed, _ in answerer.asked} == {0, 1, 2}
    numbers = [(seed, number) for *_, seed, number in answerer.asked]
    assert len(set(numbers)) == len(numbers) == 18
    assert found["repeats"] == [2, 4, 6] and found["score"] == 4
    assert found["spread"] == pytest.approx(2)  # of 2, 4, 6, with n - 1
    assert "standard deviation of 3 repeats: 2.00" in mt_bench.describe(found)


# ---------------------------------------------------------------------------------------- a judge that is not well
def test_a_judge_that_is_busy_slow_or_broken_for_a_while_is_asked_again(
    server: Server, files: tuple[Path, Path], tmp_path: Path
) -> None:
    def reply(prompt: str, nth: int) -> Reply:
        if nth == 1 and "cheese" in prompt:
            return Reply(b"later", 429, (("Retry-After", "1"),))
        if nth < 3 and "Two mice" in prompt:
            return Reply(b"oops", 500)
        if nth == 1:
            return says("[[1]]")._replace(delay_s=1.0)  # twice the time that is waited
        return says("[[7]]")

    server.reply = reply
    found = run(settings(server, files), Answerer(), "m", tmp_path / "k.jsonl")
    assert found["score"] == 7 and found["judgements"] == 6 and found["failed"] == 0
    for prompt, times in server.times.items():
        assert len(times) == (3 if "Two mice" in prompt else 2), prompt
        if "cheese" in prompt:
            assert times[1] - times[0] >= 1


def test_failed_judgements_are_counted_and_asked_again_by_the_next_run(
    server: Server, files: tuple[Path, Path], tmp_path: Path
) -> None:
    def reply(prompt: str, nth: int) -> Reply:
        second = prompt.count("Q ") == 2
        if "cheese" in prompt:
            return Reply(b'{"choices": [{"mess') if second else Reply(b"too long", 400)
        if "Two mice" in prompt:
            return says("A fine answer: 9 of 10 [9].") if second else says("[[11]]")
        return Reply(b"broken", 500) if second else says("[[3]]")

    server.reply = reply
    file, answerer, how = tmp_path / "k.jsonl", Answerer(), settings(server, files)
    found = run(how, answerer, "m", file)
    assert found["score"] == found["turn_1"] == 3 and found["turn_2"] is None
    assert found["by_category"] == {"math": None, "stem": 3, "writing": None}
    assert found["judgements"] == 1 and found["failed"] == 5
    assert found["failed_by_reason"] == {
        "status 400, 'too long'": 1,
        "status 500, 'broken'": 1,
        "an answer that is not a chat completion": 1,
        "a score that is not from 1 to 10": 1,
        "no [[score]] in the judgement": 1,
    }
    assert "failed: 1 judgements, no [[score]]" in mt_bench.describe(found)
    assert [len(t) for p, t in server.times.items() if "mice run" in p and p.count("Q ") == 2] == [4]  # with 3 retries

    server.reply, server.times = lambda prompt, nth: says("[[8]]"), {}
    asked = len(answerer.asked)
    found = run(how, answerer, "m", file)
    assert (found["judgements"], found["failed"]) == (6, 0)
    assert found["score"] == pytest.approx((3 + 5 * 8) / 6)
    assert len(server.times) == 5 and len(answerer.asked) == asked
    server.times = {}
    assert run(how, answerer, "m", file) == found and not server.times


def test_a_run_that_was_cut_short_goes_on_and_ends_with_the_same_file(
    server: Server, files: tuple[Path, Path], tmp_path: Path
) -> None:
    how = settings(server, files, parallel=1)
    file, answerer = tmp_path / "k.jsonl", Answerer()
    whole = run(how, answerer, "m", file)
    lines = file.read_bytes().splitlines(True)
    assert len(lines) == 1 + 6 + 6
    for kept in (0, 1, 4, 9):
        file.write_bytes(b"".join(lines[:kept]) + lines[kept][:10])
        again = Answerer()
        assert run(how, again, "m", file) == whole
        assert file.read_bytes().splitlines(True) == lines
        assert again.asked == [a for i, a in enumerate(answerer.asked) if i >= kept - 1]
    for change in ({"model": "other"}, {"max_new_tokens": 3}, {"system": "Be brief."}, {"top_k": 50}):
        other = dataclasses.replace(how, **{k: v for k, v in change.items() if k != "model"})
        with pytest.raises(UserError, match=f"another {next(iter(change))} .*Give another --output"):
            run(other, answerer, change.get("model", "m"), file)
    file.write_text('{"some": "thing"}\n')
    with pytest.raises(UserError, match="line 1 is not a line of answers"):
        run(how, answerer, "m", file)


# ---------------------------------------------------------------------------------------- a judge that refuses
def test_refusing_judge_is_an_error_before_anything_is_answered(server: Server, files: tuple[Path, Path]) -> None:
    def said(url: str) -> str:
        judge = make_judge(url, "j", "MICE_JUDGE_KEY")
        with pytest.raises(UserError) as e:
            mt_bench.load_settings(judge, str(files[0].parent), str(files[1]), defaults=GenerationDefaults())
        return str(e.value)

    server.reply = lambda prompt, nth: Reply(f"Incorrect API key provided: {KEY}.".encode(), 401)
    error = said(server.url)
    assert "\n" not in error and "refuses: status 401, 'Incorrect API key provided: ***.'" in error
    assert len(server.asked) == 1
    server.reply = lambda prompt, nth: Reply(b"no such model", 400)
    assert "status 400, 'no such model'. Nothing was generated yet" in said(server.url)
    closed = Server()
    closed.close()
    assert "no answer: NewConnectionError" in said(closed.url)


def test_judge_that_refuses_half_way_ends_the_run_and_keeps_scores(
    server: Server, files: tuple[Path, Path], tmp_path: Path
) -> None:
    server.reply = lambda prompt, nth: says("[[5]]") if "cheese" in prompt else Reply(b"out of money", 403)
    how, file = settings(server, files, parallel=1), tmp_path / "k.jsonl"
    with pytest.raises(UserError, match="refuses: status 403, 'out of money'"):
        run(how, Answerer(), "m", file)
    asked = len(server.asked)
    assert 3 <= asked <= 4  # of those that waited, one may have begun meanwhile
    server.reply = lambda prompt, nth: says("[[5]]")
    assert run(how, Answerer(), "m", file)["judgements"] == 6
    assert len(server.asked) == asked + 4


def test_a_judge_that_thinks_before_it_speaks_is_there_all_the_same(
    server: Server, files: tuple[Path, Path], tmp_path: Path
) -> None:
    server.reply = lambda prompt, nth: says(None) if "yes" in prompt or "cheese" in prompt else says("[[4]]")
    how = settings(server, files)
    how.judge.check()
    assert server.asked[0]["max_tokens"] == 2048  # a word cut short is refused by some
    found = run(how, Answerer(), "m", tmp_path / "k.jsonl")
    assert found["judgements"] == 4 and found["failed_by_reason"] == {"a chat completion without a text": 2}
    for wrong in (b"{}", b'{"choices": []}', b'{"choices": [{"message": "yes"}]}', b"yes"):
        server.reply = lambda prompt, nth, wrong=wrong: Reply(wrong)
        with pytest.raises(UserError, match=r"an answer that is not a chat completion\. Nothing was generated yet"):
            how.judge.check()


def test_endpoint_that_takes_only_max_completion_tokens_gets_it(
    server: Server, files: tuple[Path, Path], tmp_path: Path
) -> None:
    says_no = Reply(b"Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", 400)
    server.judges = lambda body: says_no if "max_tokens" in body else says("[[4]]")
    how = settings(server, files)
    how.judge.check()
    assert run(how, Answerer(), "m", tmp_path / "k.jsonl")["judgements"] == 6
    names = ["max_tokens" in a for a in server.asked]
    assert names == [True] + [False] * 7 and server.asked[1]["max_completion_tokens"] == 2048
    server.judges = lambda body: Reply(b"max_tokens is too large", 400)  # of both
    with pytest.raises(UserError, match="status 400, 'max_tokens is too large'"):
        settings(server, files).judge.check()


def test_the_key_is_in_no_file_no_log_and_no_error(
    server: Server, files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.reply = lambda prompt, nth: Reply(f"{KEY} is bad".encode(), 500) if nth == 1 else says("[[5]]")
    how = settings(server, files, retries=0)
    found = run(how, Answerer(), "m", tmp_path / "k.jsonl")
    assert found["failed"] == 6
    assert "'*** is bad'" in str(found) and "urllib3" in caplog.text
    for text in (repr(how), str(found), caplog.text, (tmp_path / "k.jsonl").read_text()):
        assert KEY not in text
    assert server.asked[0]["key"] == f"Bearer {KEY}"


def test_an_address_or_a_key_that_makes_no_sense_is_refused(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url, words in (
        (None, "a judge is needed"),
        ("localhost:80", "must begin with http"),
        ("https://u:secret@h/v1", "holds a name or a key"),
        ("https://h/v1?key=secret", "holds a name or a key"),
    ):
        with pytest.raises(UserError, match=words) as e:
            make_judge(url, "j", "MICE_JUDGE_KEY")
        assert "secret" not in str(e.value)
    monkeypatch.setenv("MICE_JUDGE_KEY", "two\nlines")
    with pytest.raises(UserError, match="MICE_JUDGE_KEY contains characters") as e:
        make_judge("http://h", "j", "MICE_JUDGE_KEY")
    assert "lines" not in str(e.value)
    monkeypatch.delenv("MICE_JUDGE_KEY")
    assert make_judge("http://h/", "j", "MICE_JUDGE_KEY").url == "http://h"


# ---------------------------------------------------------------------------------------- files
def test_a_question_may_hold_any_sign_that_ends_lines_elsewhere(tmp_path: Path) -> None:
    odd = QUESTIONS[0] | {"turns": ["one\u2028line\x85 and\x0b no more", "Shorter."]}
    file = tmp_path / "question.jsonl"
    file.write_text(json.dumps(odd, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_questions(file)[0].turns == ("one\u2028line\x85 and\x0b no more", "Shorter.")


def test_references_are_read_from_the_folder_beside_the_questions(tmp_path: Path) -> None:
    bare = [{k: v for k, v in q.items() if k != "reference"} for q in QUESTIONS]
    file = write_jsonl(tmp_path / "question.jsonl", bare)
    with pytest.raises(UserError, match=r"question.jsonl line 2 is of category 'math'.*has none"):
        read_questions(file)
    (tmp_path / "reference_answer").mkdir()
    reference = {"question_id": 2, "choices": [{"index": 0, "turns": ["F4", "F6"]}]}
    write_jsonl(tmp_path / "reference_answer" / "model.jsonl", [reference])
    questions = read_questions(file)
    assert [q.reference for q in questions] == [None, ("F4", "F6"), None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"turns": ["one"]}, "line 1 must have question_id"),
        ({"question_id": "1"}, "line 1 must have question_id"),
        ({"question_id": 2}, "line 2 has question_id 2, which another line also has"),
        ({"category": "cheese"}, "category 'cheese'; the temperature is known for writing"),
    ],
)
def test_a_bad_question_is_named_by_its_line(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", [QUESTIONS[0] | change, *QUESTIONS[1:]])
    with pytest.raises(UserError, match=re.escape(words)):
        read_questions(file)


def test_prompts_that_are_missing_or_have_unknown_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no prompt named single-math-v1-multi-turn; it has single-v1"):
        read_prompts(write_jsonl(tmp_path / "p.jsonl", PROMPTS[:-1]))
    odd = PROMPTS[1] | {"prompt_template": "{question} {anwser}"}
    with pytest.raises(UserError, match="the prompt single-v1 has an unknown placeholder: 'anwser'"):
        read_prompts(write_jsonl(tmp_path / "p.jsonl", [odd, *PROMPTS[2:]]))


def test_without_a_path_files_come_from_an_installed_package(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--questions is missing, and no installed"):
        mt_bench._file("questions", None, "mt_bench/question.jsonl")
    package = tmp_path / "site" / "fastchat"
    (package / "llm_judge" / "data" / "mt_bench").mkdir(parents=True)
    (package / "__init__.py").touch()
    file = files[0].rename(package / "llm_judge" / "data" / "mt_bench" / "question.jsonl")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert mt_bench._file("questions", None, "mt_bench/question.jsonl") == file
    with pytest.raises(UserError, match="--questions: there is no file"):
        mt_bench._file("questions", "nowhere.jsonl", "mt_bench/question.jsonl")


def test_a_score_is_the_first_in_double_brackets() -> None:
    assert score_of("I say [[8.5]], not [[2]].") == 8.5
    for said in ("[8]", "[[rating]]", "[[0]]", "[[10.5]]", ""):
        with pytest.raises(Unusable):
            score_of(said)


# ---------------------------------------------------------------------------------------- with a model
def test_model_answers_both_turns_and_missing_room_is_counted(
    server: Server, files: tuple[Path, Path], tmp_path: Path
) -> None:
    llama(tmp_path / "m", vocab_size=300, initializer_range=0.3, max_position_embeddings=104)
    decoder, params = load(tmp_path / "m", mesh_of(1, 1, 1))
    encoder = ChatEncoder(make_tokenizer())
    model = ChatModel(Sampler(decoder, jnp.float32), params, encoder, encoder.stop_ids())
    how = Settings(server.judge(), read_questions(files[0]), read_prompts(files[1]), 1, max_new_tokens=16)
    sizes = {}

    def answerer(conversations: Sequence[list[Message]], *rest: Any) -> Iterator[Completion | None]:
        for messages in conversations:
            sizes[messages[0]["content"], len(messages)] = len(encoder.prompt_ids(messages))
        return model.chat_batch(conversations, *rest, batch_size=2)

    found = run(how, answerer, "m", tmp_path / "k.jsonl")
    too_long = [key for key, size in sizes.items() if size + 16 > 104]
    assert 0 < len(too_long) < 3 and all(turn == 3 for _, turn in too_long)
    assert found["unanswered"] == len(too_long) and found["judgements"] == 6 - len(too_long)
    assert f"unanswered: {len(too_long)} turn" in mt_bench.describe(found)
    lines = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    first = next(a["answer"] for a in lines if a.get("question_id") == 2 and a.get("turn") == 1 and "answer" in a)
    messages = [{"role": "user", "content": "Two mice and two?"}]
    alone = model.stream(encoder.prompt_ids(messages), Sampling(16), lambda piece: None)
    assert first == alone.text != ""


ENDED = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if m.role == 'assistant' %}END{% else %}<|endoftext|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.slow
def test_evaluate_grades_answers_and_writes_the_harness_format(
    server: Server,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"] + ["lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)  # MT-Bench needs no harness
    server.reply = lambda prompt, nth: says(f"[[{score_in(prompt)}]]") if "Q " in prompt else says("yes")
    llama(tmp_path / "m", vocab_size=300, initializer_range=0.3, max_position_embeddings=4096)
    # A template that ends its turns with a sign that the model writes, which generation_config.json does not name.
    asked = [f"--model={tmp_path / 'm'}", "--system=Be.", "--max_new_tokens=64", "--prompt=Two mice and two?"]
    make_tokenizer(ENDED).save_pretrained(tmp_path / "m")
    assert run_verb(generate.main, asked) == 0
    whole = capsys.readouterr().out.removesuffix("\n")
    end = next(sign for sign in whole[8:] if make_tokenizer().tokenize(sign) == [sign] and sign not in whole[:8])
    make_tokenizer(ENDED.replace("END", end)).save_pretrained(tmp_path / "m")
    assert run_verb(generate.main, asked) == 0
    ended = capsys.readouterr().out.removesuffix("\n")
    assert ended == whole.partition(end)[0]

    output = tmp_path / "scores.json"
    argv = [f"--questions={files[0].parent}", f"--judge_prompts={files[1]}"]
    argv += [f"--judge_url={server.url}", "--judge_model=j", "--judge_key_env=MICE_JUDGE_KEY"]
    argv += [f"--model={tmp_path / 'm'}", "--tasks=mt_bench", "--system_instruction=Be."]
    assert run_verb(evaluate.main, [*argv, f"--output={output}"]) == 0
    found = json.loads(output.read_text())
    assert found["results"]["mt_bench"]["score,none"] == found["mt_bench"]["score"] == 5.5
    assert found["mt_bench"]["judgements"] == 6 and "MT-Bench 5.50" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "scores.mt_bench.jsonl").read_text().splitlines()]
    first = {"repeat": 0, "question_id": 2, "turn": 1, "answer": ended, "stopped": True}
    assert first in lines
    assert lines[0]["settings"].items() >= {"system": "Be.", "top_k": 50, "top_p": 1.0}.items()
    count = len(server.asked)
    assert run_verb(evaluate.main, [*argv, f"--output={output}"]) == 0  # only the question whether the judge is there
    assert len(server.asked) == count + 1 and json.loads(output.read_text())["mt_bench"] == found["mt_bench"]

    # Of three questions one; and what is not for it is refused.
    assert run_verb(evaluate.main, [*argv, f"--output={tmp_path / 'few.json'}", "--limit=0.3"]) == 0
    assert json.loads((tmp_path / "few.json").read_text())["mt_bench"]["judgements"] == 2
    for wrong, words in (
        ("--judge_model=", "a judge is needed"),
        ("--num_fewshot=2", "--num_fewshot is for the harness's tasks; mt_bench asks its questions without examples"),
    ):
        assert run_verb(evaluate.main, [*argv, f"--output={output}", wrong]) == 2
        assert words in capsys.readouterr().err

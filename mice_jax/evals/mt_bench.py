"""MT-Bench: two-turn answers, each turn graded by a judge from 1 to 10.

This follows FastChat's `llm_judge`. The temperature depends on the category, each turn is judged separately (the second
with the first in the prompt), and maths, reasoning and coding are judged with a reference answer. The questions, the
judge's prompts and the references are files in FastChat's formats, which are not part of this package. Answers and
judgements are written to a file line by line, so that a second run pays only for those that are missing. Judgements
that fail are counted by reason and left out of the means, and the next run asks for them again.
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

from mice_jax.cli.task_names import MT_BENCH
from mice_jax.errors import UserError, format_count
from mice_jax.evals.judge import Judge, Unusable, score_of
from mice_jax.inference.chat import Completion, Message
from mice_jax.inference.generation_config import GenerationDefaults
from mice_jax.inference.sampler import Sampling

NAME = MT_BENCH
TURNS = (1, 2)
MAX_NEW_TOKENS = 1024  # The longest answer of a turn, in tokens.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
REFERENCED = ("math", "reasoning", "coding")  # Answers in these categories are judged with a reference answer.
# The names of the judge's prompts for each turn, by whether there is a reference answer.
PROMPTS = {False: ("single-v1", "single-v1-multi-turn"), True: ("single-math-v1", "single-math-v1-multi-turn")}
PACKAGE = "fastchat"  # It has the data only if it is installed from a checkout; its wheels do not.

# A function that answers conversations in order and yields None where the model has no positions left for an answer.
# The draws of an answer depend on the seed and on the number that is given with the conversation.
Answerer = Callable[[Sequence[list[Message]], Sampling, Sequence[int]], Iterator[Completion | None]]
Watch = Callable[[str, int, int], None]  # It is called with the kind of work, the number that is done, and the total.
Key = tuple[int, int, int]  # The repeat, question id and turn of an answer or judgement.


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of two turns.

    Attributes:
      id: The question's number in its file.
      category: The category, one of TEMPERATURES.
      turns: The user's messages.
      reference: The reference answer of each turn; None if the category has none.
    """

    id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of the judge: a system message, and a template with placeholders for questions and answers."""

    system: str
    template: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked, and who judges the answers.

    Attributes:
      judge: The judge.
      questions: The questions.
      prompts: The judge's prompts by name.
      repeats: The number of times that all questions are answered and judged.
      max_new_tokens: The longest answer of a turn, in tokens.
      system: The system message of each conversation; None sends none.
      top_p: The model's top_p, for categories whose temperature is above 0.
      top_k: The model's top_k, for categories whose temperature is above 0.
    """

    judge: Judge
    questions: tuple[Question, ...]
    prompts: dict[str, Prompt]
    repeats: int
    max_new_tokens: int = MAX_NEW_TOKENS
    system: str | None = None
    top_p: float = 1.0
    top_k: int = 0

    def describe(self, model: str) -> dict[str, Any]:
        """Returns everything that answers and judgements depend on; `model` identifies the model."""
        content = [[dataclasses.asdict(q) for q in self.questions], {k: vars(p) for k, p in self.prompts.items()}]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        judge = {"judge_url": self.judge.url, "judge_model": self.judge.model}
        how = {name: getattr(self, name) for name in ("max_new_tokens", "system", "top_p", "top_k")}
        return {"model": model, **judge, "files": digest, **how}


# ---------------------------------------------------------------------------------------- questions and prompts
def load_settings(
    judge: Judge,
    questions_file: str | None,
    prompts_file: str | None,
    *,
    repeats: int = 1,
    limit: float | None = None,
    system: str | None = None,
    defaults: GenerationDefaults,
) -> Settings:
    """Reads the questions and prompts and asks the judge a test question, so that errors appear before any computation.

    Args:
      judge: The judge.
      questions_file: question.jsonl or its folder; None takes that of an installed fastchat.
      prompts_file: judge_prompts.jsonl or its folder; None takes that of an installed fastchat.
      repeats: How often all questions are answered and judged.
      limit: The number of questions to ask, or below 1 a fraction of them; None asks all.
      system: The system message of each conversation.
      defaults: The model's generation defaults, of which FastChat, through transformers, applies top_p and top_k.

    Returns:
      The settings.

    Raises:
      UserError: A file is missing or not valid, or the judge cannot be used.
    """
    questions = read_questions(_file("questions", questions_file, "mt_bench/question.jsonl"))
    prompts = read_prompts(_file("judge_prompts", prompts_file, "judge_prompts.jsonl"))
    judge.check()
    if limit is not None:
        questions = questions[: math.ceil(limit * len(questions)) if limit < 1 else int(limit)]
    top_p, top_k = defaults.sampling_defaults()
    return Settings(judge, questions, prompts, repeats, system=system, top_p=top_p, top_k=top_k)


def read_questions(file: Path) -> tuple[Question, ...]:
    """Reads questions, with references from the same file or from `reference_answer/*.jsonl` in its folder.

    Args:
      file: A question.jsonl in FastChat's format.

    Returns:
      The questions in the order of the file.

    Raises:
      UserError: The file cannot be read, or a line is not valid.
    """
    answers: dict[int, Any] = {}
    for other in sorted(file.parent.glob("reference_answer/*.jsonl")):
        for where, record in _records(other):
            try:
                answers[record["question_id"]] = record["choices"][0]["turns"]
            except (LookupError, TypeError):
                raise UserError(f"{where} must have a question_id and choices[0].turns.") from None
    questions: dict[int, Question] = {}
    for where, record in _records(file):
        number, category = record.get("question_id"), record.get("category")
        turns: Any = record.get("turns")
        if type(number) is not int or not isinstance(category, str) or not _two_texts(turns):
            raise UserError(f"{where} must have question_id (a number), category (a text) and turns (two texts).")
        if number in questions:
            raise UserError(f"{where} has question_id {number}, which another line also has.")
        if category not in TEMPERATURES:
            known = ", ".join(TEMPERATURES)
            raise UserError(f"{where} is of category {category!r}; the temperature is known for {known}.")
        reference: Any = answers.get(number, record.get("reference"))
        if category in REFERENCED and not _two_texts(reference):
            raise UserError(
                f"{where} is of category {category!r}, which is judged beside a reference answer; it has none of two "
                f"texts, neither as its `reference` nor in {file.parent / 'reference_answer'}/*.jsonl."
            )
        questions[number] = Question(
            number, category, tuple(turns), tuple(reference) if category in REFERENCED else None
        )
    if not questions:
        raise UserError(f"{file} holds no question.")
    return tuple(questions.values())


def read_prompts(file: Path) -> dict[str, Prompt]:
    """Reads the judge's prompts that are needed, and checks that all their placeholders can be filled.

    Args:
      file: A judge_prompts.jsonl in FastChat's format.

    Returns:
      The prompts by name.

    Raises:
      UserError: The file cannot be read, a prompt is missing, or it has an unknown placeholder.
    """
    found = {}
    for where, record in _records(file):
        name, system, template = (record.get(k) for k in ("name", "system_prompt", "prompt_template"))
        if name in (*PROMPTS[False], *PROMPTS[True]):
            if not isinstance(system, str) or not isinstance(template, str):
                raise UserError(f"{where} must have system_prompt and prompt_template, two texts.")
            found[name] = Prompt(system, template)
    for name in (*PROMPTS[False], *PROMPTS[True]):
        if name not in found:
            raise UserError(f"{file} has no prompt named {name}; it has {', '.join(found) or 'none of those needed'}.")
    for with_reference, names in PROMPTS.items():
        tried = Question(0, "", ("?", "?"), ("!", "!") if with_reference else None)
        for turn, name in zip(TURNS, names, strict=True):
            try:
                judge_prompt(found, tried, ("a", "b"), turn)
            except (LookupError, ValueError) as e:
                raise UserError(f"{file}: the prompt {name} has an unknown placeholder: {e}.") from None
    return found


def judge_prompt(prompts: dict[str, Prompt], question: Question, answers: Sequence[str], turn: int) -> tuple[str, str]:
    """Fills in the judge's prompt for one turn.

    Args:
      prompts: The judge's prompts by name.
      question: The question.
      answers: The model's answers to the turns so far.
      turn: The turn to judge, 1 or 2.

    Returns:
      The system message and the user's message.
    """
    prompt = prompts[PROMPTS[question.reference is not None][turn - 1]]
    places: dict[str, str] = {"question": question.turns[0], "answer": answers[0]} if turn == 1 else {}
    for t in TURNS:
        if turn == 2:
            places |= {f"question_{t}": question.turns[t - 1], f"answer_{t}": answers[t - 1]}
        if question.reference is not None:
            places[f"ref_answer_{t}"] = question.reference[t - 1]
    return prompt.system, prompt.template.format(**places)


def _file(flag: str, given: str | None, inside: str) -> Path:
    """Returns the file that a flag names, else that of an installed FastChat; raises UserError if there is none."""
    if given is not None:
        file = Path(given) / Path(inside).name if Path(given).is_dir() else Path(given)
        if not file.is_file():
            raise UserError(f"--{flag}: there is no file {file}.")
        return file
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / "llm_judge" / "data" / inside).is_file():
            return file
    raise UserError(f"--{flag} is missing, and no installed {PACKAGE} has llm_judge/data/{inside}. Give the file.")


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the file and line number of each line, and its object."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # A string may contain other line separators.
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file} cannot be read: {e}.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as e:
                raise UserError(f"{file} line {number} is not JSON: {e}.") from None
            if not isinstance(record, dict):
                raise UserError(f"{file} line {number} is not a JSON object.")
            yield f"{file} line {number}", record


def _two_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(t, str) for t in value)


# ---------------------------------------------------------------------------------------- answers and judgements
class Kept:
    """The file of answers and judgements. Each is written as one line as soon as it is available.

    Attributes:
      answers: The answers so far.
      scores: The judge's scores so far.
    """

    def __init__(self, file: Path, described: dict[str, Any]):
        """Opens or creates the file and removes an incomplete last line.

        Args:
          file: The file.
          described: What answers and judgements depend on (`Settings.describe`).

        Raises:
          UserError: The file cannot be written, is damaged, or was written with other settings.
        """
        self.answers: dict[Key, Completion] = {}
        self.scores: dict[Key, float] = {}
        content = file.read_bytes() if file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            self._read(f"{file} line {number}", number, line, described)
        try:
            self._file: TextIO = file.open("a", encoding="utf-8")
            self._file.truncate(len(whole))
        except OSError as e:
            raise UserError(f"{file} cannot be written: {e.strerror}.") from None
        if not whole:
            self._write({"settings": described})

    def add_answer(self, key: Key, answer: Completion) -> None:
        """Stores and writes an answer."""
        self.answers[key] = answer
        self._write(_named(key) | {"answer": answer.text, "stopped": answer.stopped})

    def add_score(self, key: Key, score: float, judgement: str) -> None:
        """Stores and writes a score.

        Args:
          key: The answer that is judged.
          score: The score.
          judgement: The full text of the judgement.
        """
        self.scores[key] = score
        self._write(_named(key) | {"score": score, "judgement": judgement})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self, where: str, number: int, line: bytes, described: dict[str, Any]) -> None:
        try:
            record = json.loads(line)
            if number == 1:
                there = record["settings"]
            else:
                key = record["repeat"], record["question_id"], record["turn"]
                if "score" in record:
                    self.scores[key] = float(record["score"])
                else:
                    self.answers[key] = Completion(record["answer"], record["stopped"])
                return
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{where} is not a line of answers and judgements. Give another --output.") from None
        other = [f"{k} ({there.get(k)!r}, now {v!r})" for k, v in described.items() if there.get(k) != v]
        if other:
            raise UserError(f"{where}: it was written with another {', '.join(other)}. Give another --output.")

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()


def _named(key: Key) -> dict[str, int]:
    return dict(zip(("repeat", "question_id", "turn"), key, strict=True))


def run(
    settings: Settings, answerer: Answerer, model: str, file: Path, watch: Watch = lambda what, done, total: None
) -> dict[str, Any]:
    """Generates and judges the answers that are not in the file yet.

    Args:
      settings: The questions and the judge.
      answerer: Generates answers to conversations.
      model: Identifies the model, so that a file of another model is an error.
      file: The file of answers and judgements.
      watch: Called with the kind of work, the number that is done, and the total.

    Returns:
      The mean scores, and the numbers of judgements, failures and missing answers.

    Raises:
      UserError: The file has answers of another model or other settings, or the judge cannot be used.
    """
    kept = Kept(file, settings.describe(model))
    try:
        unanswered = _answer(settings, answerer, kept, watch)
        failed = _judge(settings, kept, watch)
    finally:
        kept.close()
    return _summary(settings, kept, unanswered, failed)


def _answer(settings: Settings, answerer: Answerer, kept: Kept, watch: Watch) -> set[Key]:
    """Generates the missing answers; returns the keys of those for which the model has too few positions."""
    unanswered: set[Key] = set()
    total = len(settings.questions) * len(TURNS) * settings.repeats
    for repeat in range(settings.repeats):
        for turn in TURNS:
            for temperature in sorted(set(TEMPERATURES.values())):
                missing = [
                    q
                    for q in settings.questions
                    if TEMPERATURES[q.category] == temperature
                    and (repeat, q.id, turn) not in kept.answers
                    and (repeat, q.id, 1) not in unanswered
                ]
                asked = [_conversation(settings, q, turn, kept.answers.get((repeat, q.id, 1))) for q in missing]
                sampling = Sampling(settings.max_new_tokens, temperature, settings.top_p, settings.top_k, seed=repeat)
                numbers = [len(TURNS) * q.id + turn for q in missing]
                for q, answer in zip(missing, answerer(asked, sampling, numbers), strict=True):
                    if answer is None:
                        unanswered |= {(repeat, q.id, t) for t in TURNS if t >= turn}
                    else:
                        kept.add_answer((repeat, q.id, turn), answer)
                    watch("answering", len(kept.answers) + len(unanswered), total)
    return unanswered


def _conversation(settings: Settings, question: Question, turn: int, first: Completion | None) -> list[Message]:
    """Returns the messages up to a turn; `first` is the answer to the first turn, which the second one needs."""
    asked: list[Message] = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    asked.append({"role": "user", "content": question.turns[0]})
    if turn == 2:
        assert first is not None
        asked += [{"role": "assistant", "content": first.text}, {"role": "user", "content": question.turns[1]}]
    return asked


def _judge(settings: Settings, kept: Kept, watch: Watch) -> Counter[str]:
    """Asks for the missing judgements, several at once; returns the number of failures by reason."""
    by_id = {q.id: q for q in settings.questions}
    missing = [key for key in _keys(settings) if key in kept.answers and key not in kept.scores]
    failed: Counter[str] = Counter()
    writing = threading.Lock()

    def judge(key: Key) -> None:
        repeat, number, turn = key
        answers = [kept.answers[repeat, number, t].text for t in TURNS if t <= turn]
        judgement = settings.judge.ask(*judge_prompt(settings.prompts, by_id[number], answers, turn))
        score = score_of(judgement)
        with writing:  # The thread itself writes the judgement, so that an interrupted run loses none of them.
            kept.add_score(key, score, judgement)

    pool = ThreadPoolExecutor(settings.judge.parallel)
    try:
        for done, future in enumerate(as_completed([pool.submit(judge, key) for key in missing]), 1):
            try:
                future.result()
            except Unusable as e:
                failed[str(e)] += 1
            watch("judging", done, len(missing))
    finally:
        pool.shutdown(cancel_futures=True)  # This waits for requests in progress and drops the others.
    return failed


def _keys(settings: Settings) -> list[Key]:
    """Returns the keys of all answers."""
    return [(r, q.id, t) for r in range(settings.repeats) for q in settings.questions for t in TURNS]


def _summary(settings: Settings, kept: Kept, unanswered: set[Key], failed: Counter[str]) -> dict[str, Any]:
    """Returns the means over all judgements; a mean over none is None."""
    category = {q.id: q.category for q in settings.questions}
    judged = {key: kept.scores[key] for key in _keys(settings) if key in kept.scores}

    def mean(wanted: Callable[[Key], bool]) -> float | None:
        scores = [score for key, score in judged.items() if wanted(key)]
        return statistics.fmean(scores) if scores else None

    repeats = [mean(lambda key, r=r: key[0] == r) for r in range(settings.repeats)]
    known = [m for m in repeats if m is not None]
    return {
        "score": mean(lambda key: True),
        **{f"turn_{t}": mean(lambda key, t=t: key[2] == t) for t in TURNS},
        "by_category": {c: mean(lambda key, c=c: category[key[1]] == c) for c in sorted(set(category.values()))},
        "repeats": repeats,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "judgements": len(judged),
        "failed": sum(failed.values()),
        "failed_by_reason": dict(failed.most_common()),
        "unanswered": len(unanswered),
        "cut": sum(not kept.answers[key].stopped for key in _keys(settings) if key in kept.answers),
        "judge_model": settings.judge.model,
    }


def describe(found: dict[str, Any]) -> str:
    """Returns the result of `run` as a few lines of text, with the numbers of failures and missing answers."""

    def shown(score: float | None) -> str:
        return "none" if score is None else f"{score:.2f}"

    spread = "" if found["spread"] is None else f" (standard deviation of {len(found['repeats'])} repeats: "
    spread += "" if found["spread"] is None else f"{found['spread']:.2f})"
    turns = ", ".join(f"turn {t} {shown(found[f'turn_{t}'])}" for t in TURNS)
    lines = [f"MT-Bench {shown(found['score'])}{spread}, {turns}, {found['judgements']} judgements"]
    lines.append(", ".join(f"{name} {shown(score)}" for name, score in found["by_category"].items()))
    lines += [f"failed: {count} judgements, {reason}" for reason, count in found["failed_by_reason"].items()]
    if found["unanswered"]:
        lines.append(
            f"unanswered: {format_count(found['unanswered'], 'turn')}, for which the model's positions leave no room"
        )
    if found["cut"]:
        lines.append(f"cut: {format_count(found['cut'], 'answer')} at the longest length")
    return "\n".join(lines)

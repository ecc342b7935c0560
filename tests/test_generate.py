"""The verb on a small folder: a prompt, a file of them, a chat; and what it says of input that is wrong."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import sentencepiece
import torch
from transformers import ByT5Tokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from helpers.models import llama, load, mesh_of, spec_of
from helpers.runs import make_tokenizer, write_init, write_jsonl
from mice_jax import step
from mice_jax.checkpoint import Checkpoints
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.generate import main, print_answer
from mice_jax.inference.chat import ChatModel
from mice_jax.inference.sampler import Sampling
from mice_jax.inference.terminal_chat import WELCOME

NUM = 12  # tokens of an answer
QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "large batches meet low rates in the cold red barn", "id": 7},
    {"messages": [{"role": "user", "content": "the cold barn"}], "note": "é"},
    {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "red"}]}]},
    {"prompt": "mice"},
    {"prompt": ""},
]
CONVERSATIONS = [
    [{"role": "user", "content": QUESTIONS[0]["prompt"]}],
    [{"role": "user", "content": "the cold barn"}],
    [{"role": "system", "content": "be"}, {"role": "user", "content": "red"}],
    [{"role": "user", "content": "mice"}],
    [{"role": "user", "content": ""}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module", autouse=True)
def model(folder: Path) -> LlamaForCausalLM:
    made = llama(folder, vocab_size=300, initializer_range=0.3)
    make_tokenizer().save_pretrained(folder)
    return made


def expected(model: LlamaForCausalLM, messages: list[dict[str, str]], stops: list[int] | None = None) -> str:
    """What transformers answers."""
    tokenizer = make_tokenizer()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    stops = [tokenizer.eos_token_id, *(stops or [])]
    config = GenerationConfig(do_sample=False, max_new_tokens=NUM, eos_token_id=stops, pad_token_id=0)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        new = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    answer = [i for i in new[0, len(ids) :].tolist() if i not in stops]
    return tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def run(folder: Path, *flags: str) -> int:
    return main([f"--model={folder}", f"--max_new_tokens={NUM}", *flags])


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------- answers
def test_a_prompt_is_answered_as_by_transformers(
    folder: Path, model: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--prompt=mice", "--system=be") == 0
    asked = [{"role": "system", "content": "be"}, {"role": "user", "content": "mice"}]
    out, err = capsys.readouterr()
    assert out == expected(model, asked) + "\n"
    assert err == f"(cut at max_new_tokens={NUM})\n"


def test_a_file_is_answered_in_order_and_an_output_cut_short_is_continued(
    folder: Path, model: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, answers = write_jsonl(tmp_path / "q.jsonl", QUESTIONS), tmp_path / "a.jsonl"
    flags = [f"--input={questions}", f"--output={answers}", "--batch_size=2"]
    assert run(folder, *flags) == 0
    lines = read(answers)
    assert [{k: v for k, v in a.items() if k not in ("response", "stopped")} for a in lines] == QUESTIONS
    assert [a["response"] for a in lines] == [expected(model, c) for c in CONVERSATIONS]
    assert len({a["response"] for a in lines}) == len(QUESTIONS)
    assert all(a["stopped"] is False for a in lines)
    assert "answered 5 lines" in capsys.readouterr().out

    whole = answers.read_bytes()
    answers.write_bytes(b"".join(whole.splitlines(True)[:2]) + whole.splitlines(True)[2][:20])
    assert run(folder, *flags) == 0
    assert answers.read_bytes() == whole
    out = capsys.readouterr().out
    assert f"{answers} has 2 of 5 answers already" in out
    assert "answered 3 lines" in out

    assert run(folder, *flags) == 0
    assert answers.read_bytes() == whole
    assert "has 5 of 5" in capsys.readouterr().out


def test_what_the_generation_config_names_ends_an_answer(folder: Path, model: LlamaForCausalLM, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    tokenizer = make_tokenizer()
    whole = expected(model, CONVERSATIONS[3])
    stop = tokenizer.encode(whole, add_special_tokens=False)[4]
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 299]}))
    questions, answers = write_jsonl(tmp_path / "q.jsonl", QUESTIONS[3:4]), tmp_path / "a.jsonl"
    assert run(own, f"--input={questions}", f"--output={answers}") == 0
    response = expected(model, CONVERSATIONS[3], [stop])
    assert read(answers) == [{"prompt": "mice", "response": response, "stopped": True}]
    assert whole.startswith(response)
    assert response != whole


@pytest.mark.slow
def test_answers_are_drawn_as_the_folder_says_unless_flags_say_otherwise(
    folder: Path, model: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, greedy = tmp_path / "own", expected(model, CONVERSATIONS[3])
    shutil.copytree(folder, own)

    def answer(said: dict[str, Any], *flags: str) -> tuple[str, str]:
        (own / "generation_config.json").write_text(json.dumps(said))
        assert run(own, "--prompt=mice", *flags) == 0
        out, err = capsys.readouterr()
        return out.removesuffix("\n"), err.replace(f"(cut at max_new_tokens={NUM})\n", "")

    hot = {"do_sample": True, "temperature": 5.0}
    drawn, told = answer(hot)
    hint = (
        f"{own}/generation_config.json has temperature=5.0: answers are drawn with these, unless flags override them\n"
    )
    assert drawn != greedy and told == hint
    assert answer({}, "--temperature=5") == (drawn, "")
    assert answer(hot, "--temperature=0") == (greedy, "")
    assert answer(hot | {"top_k": 1})[0] == answer(hot | {"top_p": 1e-6})[0] == greedy
    assert answer(hot | {"top_k": 1}, "--top_k=0")[0] == drawn
    assert answer(hot | {"do_sample": False}) == (greedy, "")

    text, told = answer({"repetition_penalty": 1.3, "num_beams": 1, "min_p": None})
    assert text == greedy and told == (
        f"warning: {own}/generation_config.json has repetition_penalty=1.3, which transformers applies and "
        "mice_jax ignores\n"
    )
    for wrong, words in (
        ({"top_p": 2}, "has top_p=2; it must be above 0 and at most 1"),
        ({"top_k": "many"}, "has top_k='many'; it must be a whole number"),
        ({"eos_token_id": "end"}, "has eos_token_id='end'; it must be a token id"),
        ([], "is not a JSON object"),
    ):
        (own / "generation_config.json").write_text(json.dumps(wrong))
        assert f"{own}/generation_config.json {words}" in said(capsys, own, "--prompt=mice")


def test_an_output_of_other_settings_is_left_alone_and_both_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, answers = write_jsonl(tmp_path / "q.jsonl", QUESTIONS), tmp_path / "a.jsonl"
    flags = [f"--input={questions}", f"--output={answers}", "--batch_size=2"]  # as above, in the same programs
    assert run(folder, *flags) == 0
    whole = answers.read_bytes()
    begun = b"".join(whole.splitlines(True)[:2])
    answers.write_bytes(begun)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    llama(other, seed=1, vocab_size=300, initializer_range=0.3)
    for changed, words in (
        ([folder, "--temperature=0.5"], "was written with temperature 0.0 (now 0.5). Ask as before"),
        ([folder, "--system=be kind"], "system None (now 'be kind')"),
        ([folder, "--stop=x", "--seed=3"], "seed 0 (now 3), stop [] (now ['x'])"),
        ([other], f"model '{folder}' (now '{other}'), weights '"),
    ):
        assert words in said(capsys, changed[0], *flags, *changed[1:])
        assert answers.read_bytes() == begun
    moved = tmp_path / "moved"  # the same model at another place
    shutil.copytree(folder, moved)
    assert run(moved, *flags) == 0
    assert answers.read_bytes() == whole
    (tmp_path / "a.jsonl.settings.json").unlink()
    assert "a.jsonl.settings.json, which says how the answers" in said(capsys, folder, *flags)


def test_a_run_answers_from_its_newest_checkpoint_or_the_one_asked_for(
    folder: Path, model: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, params = load(folder, mesh_of(1, 1, 1))
    (tmp_path / "run").mkdir()
    shutil.copytree(folder, tmp_path / "run" / "model")
    checkpoints = Checkpoints(tmp_path / "run")
    for number, scale in ((1, 1.0), (2, -1.0)):
        scaled = jax.tree.map(lambda p, scale=scale: p * scale, params)
        checkpoints.save(
            step.TrainState(jnp.asarray(number, jnp.int32), scaled, {"none": jnp.zeros(())}), {"samples": 1}
        )
    checkpoints.wait()
    checkpoints.close()
    assert run(tmp_path / "run", "--step=1", "--prompt=mice") == 0
    answer = capsys.readouterr().out
    assert answer == expected(model, CONVERSATIONS[3]) + "\n"
    assert run(tmp_path / "run", "--prompt=mice") == 0
    assert capsys.readouterr().out != answer
    assert run(tmp_path / "run", "--step=3", "--prompt=mice") == 2
    assert "has no step 3; it has 1, 2" in capsys.readouterr().err


@pytest.mark.parametrize("cls", ["SentencePieceBackend", "BertGenerationTokenizer", "ByT5Tokenizer"])
def test_a_character_of_many_tokens_is_printed_once_all_of_it_is_there(
    cls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer(tmp_path, cls)
    answer = "é it 🤖🤖 so"
    ids = tokenizer.encode(answer, add_special_tokens=False)
    assert len(ids) > len(answer)
    printed: list[str] = []

    class Script:
        spec = spec_of()

        def stream(self, *args: Any) -> Iterator[int]:
            for i in ids:
                yield i
                printed.append(capsys.readouterr().out)

    encoder = ChatEncoder(tokenizer, "{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    sampler: Any = Script()
    assert (
        print_answer(ChatModel(sampler, {}, encoder, []), [{"role": "user", "content": "é"}], Sampling(100)) == answer
    )
    assert "".join(printed) + capsys.readouterr().out == answer + "\n"
    assert {"é", "🤖"} <= {p.strip() for p in printed}
    assert not any("\ufffd" in p or "<0x" in p for p in printed)
    assert printed[0] == ""  # of é's first byte, or of the space before it


def byte_tokenizer(folder: Path, cls: str) -> PreTrainedTokenizerBase:
    """One whose unknown characters are bytes."""
    if cls == "ByT5Tokenizer":
        ByT5Tokenizer().save_pretrained(folder)
        return load_tokenizer(str(folder))
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["it is so", "so it is"] * 9), model_writer=file, model_type="bpe", vocab_size=300,
            hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        )  # fmt: skip
    config = {"tokenizer_class": cls, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder))


def test_a_text_that_ends_answers_may_lie_within_and_across_tokens(
    folder: Path, model: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [expected(model, c) for c in CONVERSATIONS]
    stop = "[c"  # the first answer has it, in a token and the beginning of the next
    assert stop in whole[0] and make_tokenizer().tokenize(stop) == ["[", "c"] and "co" in make_tokenizer().get_vocab()
    assert stop + "o" in whole[0] and sum(stop in w for w in whole) < len(whole)
    questions, answers = write_jsonl(tmp_path / "q.jsonl", QUESTIONS), tmp_path / "a.jsonl"
    flags = [f"--input={questions}", f"--output={answers}", "--batch_size=2"]
    assert run(folder, *flags, f"--stop={stop}", "--stop=never seen") == 0
    lines = read(answers)
    assert [a["response"] for a in lines] == [w.split(stop)[0] for w in whole]
    assert [a["stopped"] for a in lines] == [stop in w for w in whole]
    capsys.readouterr()
    assert run(folder, f"--prompt={QUESTIONS[0]['prompt']}", f"--stop={stop}") == 0
    assert capsys.readouterr() == (whole[0].split(stop)[0] + "\n", "")


def test_what_may_be_the_beginning_of_an_end_is_shown_once_it_is_none() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("mice learn cold barn", add_special_tokens=False)
    words = [tokenizer.decode([i]) for i in ids]
    assert words == ["mice", " learn", " cold", " barn"]

    class Script:
        def stream(self, *args: Any) -> Iterator[int]:
            yield from ids

    def shown(*stops: str) -> tuple[list[str], bool]:
        pieces: list[str] = []
        sampler: Any = Script()
        spoken = ChatModel(sampler, {}, ChatEncoder(tokenizer), [], stops).stream([1], Sampling(4), pieces.append)
        assert "".join(pieces) == spoken.text
        return pieces, spoken.stopped

    assert shown() == ([*words, ""], False)
    assert shown("ice learn", "zz") == (["m", ""], True)  # held back from its first character, then never shown
    assert shown("learnt") == (["mice", " ", "learn cold", " barn", ""], False)
    assert shown("cold barn!") == (["mice", " learn", " ", "cold barn"], False)


def test_a_chat_remembers_until_it_is_cleared(
    folder: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("mice\nred\n/clear\n\nmice\n/exit\nunseen\n"))
    assert run(folder) == 0
    out = capsys.readouterr().out
    first = expected(model, CONVERSATIONS[3])
    both = [*CONVERSATIONS[3], {"role": "assistant", "content": first}, {"role": "user", "content": "red"}]
    cleared = "A new conversation, with no system message."
    assert out == f"{WELCOME}\n> {first}\n> {expected(model, both)}\n> {cleared}\n> > {first}\n> "
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(folder) == 0


# ---------------------------------------------------------------------------------------- wrong input
def said(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    """What the one paragraph on stderr says; the exit code is 2."""
    capsys.readouterr()
    assert run(folder, *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_flags_that_do_not_go_together_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--prompt=a"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert f"{tmp_path}/none does not exist or is not a folder" in said(capsys, tmp_path / "none", "--prompt=a")
    assert "random weights" in said(capsys, Path(f"random:{write_init(tmp_path)}"), "--prompt=a")
    assert "is for a run's workdir" in said(capsys, folder, "--prompt=a", "--step=3")
    assert "--prompt and --input are both given" in said(capsys, folder, "--prompt=a", "--input=b")
    assert "--input and --output go together" in said(capsys, folder, "--input=b")
    assert "--input and --output go together" in said(capsys, folder, "--prompt=a", "--output=b")
    assert "temperature=-1.0 must be" in said(capsys, folder, "--prompt=a", "--temperature=-1")
    assert "compute_dtype=half is not one of" in said(capsys, folder, "--prompt=a", "--compute_dtype=half")
    assert "--stop is empty" in said(capsys, folder, "--prompt=a", "--stop=")
    assert "--batch_size=0" in said(capsys, folder, "--prompt=a", "--batch_size=0")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": ', "is not JSON"),
        ("[1]", "is not an object"),
        ('{"prompt": "\\ud83d"}', "lone surrogate"),
        ("{}", "either `messages` or `prompt`"),
        ('{"prompt": "a", "messages": []}', "either `messages` or `prompt`"),
        ('{"prompt": 3}', "`prompt` must be a string"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "elephant", "content": "a"}]}', "messages[0] must be an object whose `role`"),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages[0].content must be a string"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "last message is of role 'assistant'"),
        (json.dumps({"prompt": "x" * 700}), "max_new_tokens=12 make 7"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"prompt": "a"}\n\n' + line + "\n")
    error = said(capsys, folder, f"--input={questions}", f"--output={tmp_path / 'a.jsonl'}")
    assert f"{questions} line 3" in error
    assert words in error
    assert not (tmp_path / "a.jsonl").exists()


def test_a_prompt_too_long_for_the_model_is_refused_with_both_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = said(capsys, folder, "--prompt=" + "x" * 700)
    assert "max_new_tokens=12 make" in error
    assert "the model has 640 positions" in error


def test_an_output_of_other_prompts_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, answers = write_jsonl(tmp_path / "q.jsonl", QUESTIONS), tmp_path / "a.jsonl"
    flags = [f"--input={questions}", f"--output={answers}"]
    done = {"response": "r", "stopped": True}
    write_jsonl(answers, [QUESTIONS[0] | done, QUESTIONS[2] | done])
    before = answers.read_bytes()
    assert f"{answers} line 2 is not an answer to prompt 2" in said(capsys, folder, *flags)
    assert answers.read_bytes() == before
    write_jsonl(answers, [QUESTIONS[0]])
    assert f"{answers} line 1 is not an answer" in said(capsys, folder, *flags)
    write_jsonl(answers, [q | done for q in [*QUESTIONS, QUESTIONS[0]]])
    assert "has 6 lines" in said(capsys, folder, *flags)
    assert "is --input itself" in said(capsys, folder, f"--input={questions}", f"--output={questions}")
    assert "there is no folder" in said(capsys, folder, f"--input={questions}", f"--output={tmp_path}/no/a.jsonl")
    assert "no.jsonl is not a file" in said(capsys, folder, f"--input={tmp_path}/no.jsonl", f"--output={answers}")


def test_help_is_short_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "mice generate --model=runs/demo" in out
    assert out.count("\n") < 35

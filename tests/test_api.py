"""The Python interface gives the answers of transformers and the log-probabilities of torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

import mice_jax
from helpers.models import llama
from helpers.runs import make_chats, make_tokenizer, read_json, write_init, write_jsonl
from mice_jax.api import Model
from mice_jax.config import Config, ConfigError, Phase, Source
from mice_jax.errors import UserError

NUM = 8  # tokens of an answer
CHAT = [{"role": "system", "content": "be"}, {"role": "user", "content": "red"}]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    model = llama(folder, vocab_size=300, initializer_range=0.3)
    make_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def model(folder: Path, reference: LlamaForCausalLM) -> Model:
    return mice_jax.load_model(folder)


def expected(reference: LlamaForCausalLM, ids: list[int]) -> str:
    """The greedy answer of transformers."""
    tokenizer = make_tokenizer()
    stop = tokenizer.eos_token_id
    config = GenerationConfig(do_sample=False, max_new_tokens=NUM, eos_token_id=stop, pad_token_id=0)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        new = reference.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    answer = [i for i in new[0, len(ids) :].tolist() if i != stop]
    return tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def chat_ids(messages: list[dict[str, str]]) -> list[int]:
    return make_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_generate_answers_texts_and_chats_as_transformers(model: Model, reference: LlamaForCausalLM) -> None:
    answers = model.generate(["mice", CHAT, "cold barn"], max_new_tokens=NUM)
    chats = [[{"role": "user", "content": "mice"}], CHAT, [{"role": "user", "content": "cold barn"}]]
    assert answers == [expected(reference, chat_ids(chat)) for chat in chats]
    assert len(set(answers)) == 3
    assert model.chat(CHAT, max_new_tokens=NUM) == answers[1]
    assert model.generate([], max_new_tokens=NUM) == []


def test_generate_raw_continues_the_text_itself(model: Model, reference: LlamaForCausalLM) -> None:
    ids = make_tokenizer().encode("mice learn")
    assert model.generate(["mice learn"], max_new_tokens=NUM, raw=True) == [expected(reference, ids)]


def test_stop_text_ends_an_answer(model: Model) -> None:
    (whole,) = model.generate(["mice"], max_new_tokens=NUM)
    stop = whole[2:4]
    assert model.generate(["mice"], max_new_tokens=NUM, stop=stop) == [whole.split(stop)[0]]


def test_draws_depend_on_the_seed_alone(model: Model) -> None:
    options = {"max_new_tokens": NUM, "temperature": 2.0, "top_k": 50, "top_p": 0.95}
    first, second, other = (model.generate(["mice"], seed=seed, **options) for seed in (1, 1, 2))
    assert first == second != other


def test_score_equals_the_log_probabilities_of_torch(model: Model, reference: LlamaForCausalLM) -> None:
    texts = ["mice learn", "mice learn to compete with elephants", "cold red barn"]
    for text, score in zip(texts, model.score(texts), strict=True):
        ids = torch.tensor(make_tokenizer().encode(text))
        with torch.no_grad():
            logprobs = torch.log_softmax(reference(ids[None]).logits[0, :-1].double(), -1)
        wanted = float(logprobs[torch.arange(len(ids) - 1), ids[1:]].sum())
        # The sum has at most 20 terms of float32 logits.
        assert score.logprob == pytest.approx(wanted, abs=5e-4)
        assert score.num_tokens == len(ids) - 1
    assert model.score([]) == []


def test_wrong_input_raises_the_user_error(model: Model, folder: Path, tmp_path: Path) -> None:
    for call, words in (
        (lambda: mice_jax.load_model(tmp_path / "none"), "does not exist or is not a folder"),
        (lambda: mice_jax.load_model(folder, step=3), "step=3 is for a run's workdir"),
        (lambda: mice_jax.load_model(folder, dtype="half"), "compute_dtype=half is not one of"),
        (lambda: model.generate("mice"), "give a list"),
        (lambda: model.generate([["mice"]]), r"prompts\[0\] must be a text or a list of messages"),
        (lambda: model.generate(["mice"], temperature=-1), "temperature=-1 must be"),
        (lambda: model.generate(["x" * 700], max_new_tokens=9), r"prompts\[0\] has .* the model has 640 positions"),
        (lambda: model.generate(["mice"], stop=""), "stop has an empty text"),
        (lambda: model.score(["x" * 700]), "the model has 640 positions"),
        (lambda: model.score([""]), "at least 2 are needed"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_import_of_the_package_does_not_import_jax() -> None:
    code = "import sys, mice_jax; assert 'jax' not in sys.modules; assert 'load_model' in dir(mice_jax)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_and_prepare_are_functions_of_a_config(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chats.jsonl", make_chats(16))
    config = Config()
    config.model.init_from = f"random:{write_init(tmp_path / 'init')}"
    config.data.max_length = 128
    config.data.cache_dir = str(tmp_path / "stores")
    config.data.phases = [Phase(name="one", sources=[Source(path=str(data))])]
    config.optim.batch_size, config.train.rows_per_device = 8, 1
    report = mice_jax.prepare(config, quiet=True)
    assert (sum(s["kept"] for s in report["sources"].values()), report["steps"]) == (16, 2)
    workdir = tmp_path / "run"
    summary = mice_jax.train(config, str(workdir))
    assert summary == read_json(workdir, "summary.json")
    assert (summary["status"], summary["step"], summary["samples"]) == ("completed", 2, 16)
    assert mice_jax.train(config, str(workdir))["step"] == 2, "a complete run is resumed and does nothing"
    config.optim.learning_rate = 0.5
    with pytest.raises(UserError, match=r"optim\.learning_rate"):
        mice_jax.train(config, str(workdir))
    config.optim.batch_size = 0
    with pytest.raises(ConfigError, match=r"optim\.batch_size=0"):
        mice_jax.prepare(config)

"""Chat templates of the models of 2026 in the spirit of the published ones: ids and masks against texts by hand."""

from typing import Any

import pytest

from mice_jax.data.chat import ChatEncoder, Encoded
from test_chat import TEMPLATES, make, make_tokenizer, marked

pytestmark = pytest.mark.smoke

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "reasoning_content": "FIRST", "content": "Four."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "reasoning_content": "SECOND", "content": "Seven."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLED = [
    {"role": "user", "content": "Add."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]
PLAIN = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in MESSAGES]

# Of each template: the special tokens of its tokenizer (eos, then bos), the messages, and their text. What is trained
# is in brackets: never a block or a tag that the prompt of an answer has already.
WRITTEN: dict[str, tuple[list[str], list[dict[str, Any]], str]] = {
    "granite4": (
        ["<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"],
        PLAIN,
        "<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Two?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Four.<|end_of_text|>⟧\n"
        "<|start_of_role|>user<|end_of_role|>Three?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Seven.<|end_of_text|>⟧\n",
    ),
    "olmo3": (
        # The token after an earlier answer is not the one that ends an answer, and is not trained.
        ["<|endoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        MESSAGES,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>FIRST</think>Four.⟧<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>SECOND</think>Seven.<|endoftext|>⟧",
    ),
    "exaone4": (
        ["[|endofturn|]", "[BOS]", "[|system|]", "[|user|]", "[|assistant|]"],
        MESSAGES,
        "[|system|]\nBe kind.[|endofturn|]\n[|user|]\nTwo?[|endofturn|]\n"
        "[|assistant|]\n<think>\n\n</think>\n\n⟦Four.[|endofturn|]⟧\n[|user|]\nThree?[|endofturn|]\n"
        "[|assistant|]\n<think>\n⟦SECOND\n</think>\n\nSeven.[|endofturn|]⟧\n",
    ),
    "hunyuan": (
        ["<|hy_end|>", "<|hy_begin|>", "<|hy_sep|>", "<|hy_User|>", "<|hy_Assistant|>"],
        MESSAGES,
        "<|hy_begin|>Be kind.<|hy_sep|><|hy_User|>Two?<|hy_Assistant|>⟦Four.<|hy_end|>⟧<|hy_User|>Three?"
        "<|hy_Assistant|>⟦<think>\nSECOND\n</think>\n<answer>\nSeven.\n</answer><|hy_end|>⟧",
    ),
    "gemma3": (
        ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        PLAIN,
        "<bos><start_of_turn>user\nBe kind.\n\nTwo?<end_of_turn>\n<start_of_turn>model\n⟦Four.<end_of_turn>⟧\n"
        "<start_of_turn>user\nThree?<end_of_turn>\n<start_of_turn>model\n⟦Seven.<end_of_turn>⟧\n",
    ),
    "gemma4": (
        ["<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"],
        MESSAGES,
        "<bos><|turn>system\nBe kind.<turn|>\n<|turn>user\nTwo?<turn|>\n<|turn>model\n⟦Four.<turn|>⟧\n"
        "<|turn>user\nThree?<turn|>\n<|turn>model\n⟦<|channel>thought\nSECOND<channel|>Seven.<turn|>⟧\n",
    ),
    "ministral3": (
        ["</s>", "<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[THINK]", "[/THINK]"],
        MESSAGES,
        "<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Two?[/INST]⟦[THINK]FIRST[/THINK]Four.</s>⟧"
        "[INST]Three?[/INST]⟦[THINK]SECOND[/THINK]Seven.</s>⟧",
    ),
    "qwen35": (
        ["<|im_end|>", "<|im_start|>"],
        MESSAGES,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦SECOND\n</think>\n\nSeven.<|im_end|>⟧\n",
    ),
    "lfm2": (
        ["<|im_end|>", "<|startoftext|>", "<|im_start|>"],
        MESSAGES,
        "<|startoftext|><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>SECOND</think>Seven.<|im_end|>⟧\n",
    ),
}  # fmt: skip


def encoder(name: str, **options: Any) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(TEMPLATES[name], WRITTEN[name][0]), **options)


@pytest.mark.parametrize("name", WRITTEN)
def test_conversation_of_a_model_is_the_text_written_by_hand(name: str) -> None:
    _, messages, text = WRITTEN[name]
    assert marked(encoder(name), make(messages)) == text


THINKING = [name for name, (_, messages, _) in WRITTEN.items() if messages is not PLAIN]


@pytest.mark.parametrize("name", THINKING)
def test_each_turn_as_a_sample_is_trained_with_its_reasoning(name: str) -> None:
    asked = encoder(name, reasoning="per_turn")
    trained = []
    for one in asked.encode_each(list(asked.split_by_turn([make(WRITTEN[name][1])]))):
        assert isinstance(one, Encoded)
        trained.append(asked.tokenizer.decode(one.ids[one.trained > 0].tolist()))
    first, second = trained
    assert "FIRST" in first and "Four." in first
    assert "SECOND" in second and "Seven." in second and "FIRST" not in second


# Of templates that leave out the reasoning of the first answer, the number of such answers is reported.
DROPPED = {"exaone4": 1, "hunyuan": 1, "gemma4": 1, "qwen35": 1, "lfm2": 1}


@pytest.mark.parametrize("name", THINKING)
def test_reasoning_that_a_template_leaves_out_is_counted(name: str) -> None:
    (one,) = encoder(name).encode([make(WRITTEN[name][1])])
    assert sum(note.count for note in one.notes.values()) == DROPPED.get(name, 0)


def test_tools_and_documents_of_granite_4_stand_in_its_system_message() -> None:
    text = marked(encoder("granite4"), make(CALLED, TOOLS))
    assert text.startswith("<|start_of_role|>system<|end_of_role|>You are a helpful assistant.\n<tools>\n[{")
    assert text.endswith(
        "<|start_of_role|>assistant<|end_of_role|>⟦<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1}}'
        "\n</tool_call><|end_of_text|>⟧\n<|start_of_role|>user<|end_of_role|>\n<tool_response>\n2\n</tool_response>"
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>⟦Two.<|end_of_text|>⟧\n"
    )

"""Where reasoning stands in a message, and what each policy trains of it, by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import write_jsonl
from mice_jax.config import Data, Phase, Source
from mice_jax.data.chat import ChatEncoder, Encoded
from mice_jax.data.dataset import build_dataset
from mice_jax.data.reasoning import reasoning_of, with_reasoning, without_reasoning
from mice_jax.data.sources import Sample
from mice_jax.errors import UserError
from test_chat import TEMPLATES, chat, make_tokenizer

pytestmark = pytest.mark.smoke

SPECIAL = ["<|im_end|>", "<|im_start|>"]
HEAD = "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
NEXT = "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n"


# ---------------------------------------------------------------------------------------- where it stands
def said(content: str | None = None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", **({} if content is None else {"content": content}), **keys}


@pytest.mark.parametrize(
    ("message", "reasoning", "rest"),
    [
        (said("Four."), None, "Four."),
        (said("Four.", reasoning_content="Add."), "Add.", "Four."),
        (said("Four.", thinking="Add."), "Add.", "Four."),
        (said("Four.", reasoning=""), "", "Four."),
        (said("<think>\nAdd.\n</think>\n\nFour."), "Add.", "Four."),
        (said("<think>\n\n</think>\n\nFour."), "", "Four."),
        (said("Add.\nBoth.\n</think>\n\nFour."), "Add.\nBoth.", "Four."),  # the prompt has opened it
        # A text that mentions the tag: templates take what is before it for reasoning; it is not taken out.
        (said("You write </think> then."), "You write", "You write </think> then."),
        ({"role": "user", "content": "<think>a</think>b"}, None, "<think>a</think>b"),
    ],
)
def test_reasoning_is_found_replaced_and_taken_out(message: dict, reasoning: str | None, rest: str) -> None:
    assert reasoning_of(message) == reasoning
    assert without_reasoning(message) == {"role": message["role"], "content": rest}
    if reasoning is not None:
        changed = with_reasoning(message, "Other.")
        assert reasoning_of(changed) == "Other." and without_reasoning(with_reasoning(changed, reasoning)) == (
            without_reasoning(message)
        )


# ---------------------------------------------------------------------------------------- policies
def encoder(policy: str = "template", template: str = "qwen3", **options: Any) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(TEMPLATES[template], SPECIAL), reasoning=policy, **options)


def thought(first: str | None = "FIRST", second: str | None = "SECOND", inline: bool = False) -> Sample:
    """Two turns with reasoning; a template like Qwen's leaves out that of the first."""
    sample = chat("Two?", "Four.", "Three?", "Seven.")
    for i, text in ((1, first), (3, second)):
        if text is not None:
            content = sample.messages[i]["content"]
            inlined = {"content": f"<think>\n{text}\n</think>\n\n{content}"}
            sample.messages[i] |= inlined if inline else {"reasoning_content": text}
    return sample


def shown(asked: ChatEncoder, sample: Sample) -> list[tuple[str, dict[str, int]]]:
    """The text of each sample that is made of a sample, with what is trained in brackets, and its notes."""
    made = list(asked.split_by_turn([sample]))
    found = []
    for one in asked.encode_each(made):
        assert isinstance(one, Encoded), one
        found.append((asked.show(one.ids, one.trained, color=False), {k: n.count for k, n in one.notes.items()}))
    return found


THOUGHT = f"{HEAD}⟦Four.<|im_end|>⟧\n{NEXT}⟦<think>\nSECOND\n</think>\n\nSeven.<|im_end|>⟧\n"


@pytest.mark.parametrize("inline", [False, True])
def test_policies_train_what_is_written_out(inline: bool) -> None:
    sample = thought(inline=inline)
    assert shown(encoder("template"), sample) == [(THOUGHT, {"reasoning_left_out": 1})]
    untold = THOUGHT.replace("⟦Four.<|im_end|>⟧", "Four.<|im_end|>")
    assert shown(encoder("last"), sample) == [(untold, {"reasoning_untrained": 1})]
    first = f"{HEAD}⟦<think>\nFIRST\n</think>\n\nFour.<|im_end|>⟧\n"
    assert shown(encoder("per_turn"), sample) == [(first, {}), (untold, {})]
    # This template writes an empty block into a last turn without reasoning, which is not trained.
    dropped = f"{HEAD}⟦Four.<|im_end|>⟧\n{NEXT}<think>\n\n</think>\n\n⟦Seven.<|im_end|>⟧\n"
    assert shown(encoder("drop"), sample) == [(dropped, {"reasoning_dropped": 2})]


def test_turn_without_reasoning_is_trained_by_every_policy() -> None:
    plain = chat("Two?", "Four.", "Three?", "Seven.")
    whole = f"{HEAD}⟦Four.<|im_end|>⟧\n{NEXT}<think>\n\n</think>\n\n⟦Seven.<|im_end|>⟧\n"
    for policy in ("template", "last", "drop"):
        assert shown(encoder(policy), plain) == [(whole, {})]
    first, second = shown(encoder("per_turn"), plain)
    assert first == (f"{HEAD}<think>\n\n</think>\n\n⟦Four.<|im_end|>⟧\n", {})
    assert second == (whole.replace("⟦Four.<|im_end|>⟧", "Four.<|im_end|>"), {})


def test_template_that_keeps_reasoning_leaves_out_nothing() -> None:
    (one,) = shown(encoder("template", "chatml"), thought(inline=True))
    assert one[1] == {} and "FIRST" in one[0] and "SECOND" in one[0]
    # One that knows no reasoning at all leaves it out of both turns.
    assert shown(encoder("template", "chatml"), thought())[0][1] == {"reasoning_left_out": 2}


def test_text_before_a_mentioned_tag_is_counted_where_it_is_left_out() -> None:
    sample = chat("How?", "You write </think> then.", "And?", "So.")
    assert shown(encoder(), sample)[0][1] == {"reasoning_left_out": 1}
    assert shown(encoder(), chat("How?", "You write </think> then."))[0][1] == {}


def test_empty_block_in_the_data_is_counted_and_one_of_the_template_is_not() -> None:
    empty = chat("Two?", "<think>\n\n</think>\n\nFour.")
    assert shown(encoder("template", "chatml"), empty)[0][1] == {"empty_think": 1}
    assert shown(encoder("template", "qwen3"), chat("Two?", "Four."))[0][1] == {}


def test_turns_of_other_roles_are_trained_once_where_each_turn_is_a_sample() -> None:
    asked = encoder("per_turn", "chatml")
    sample = chat("Two?", "Four.", "Three?", "Seven.", "Bye", unmask=True)
    texts = [text for text, _ in shown(asked, sample)]
    assert [text.count("⟦") for text in texts] == [2, 2, 1] and all(text.endswith("⟧\n") for text in texts)
    trained = "".join(part.partition("⟧")[0] for text in texts for part in text.split("⟦")[1:])
    assert trained.replace("<|im_end|>", " ") == "Two? Four. Three? Seven. Bye "


def test_policy_chooses_among_the_turns_that_are_trained_at_all() -> None:
    sample = thought()
    assert len(shown(encoder("per_turn", train_on="last"), sample)) == 1
    sample.messages[1]["train"] = False
    assert shown(encoder("template"), sample)[0][1] == {}
    mute = chat("Two?", "Four.")
    mute.messages[1]["train"] = False
    ((text, _),) = shown(encoder("per_turn"), mute)  # kept, so that it is counted among the untrained
    assert "⟦" not in text


def test_policy_is_part_of_the_key_and_an_unknown_one_an_error() -> None:
    assert len({encoder(p).fingerprint() for p in ("template", "last", "per_turn", "drop")}) == 4
    with pytest.raises(UserError, match=r"data\.reasoning='all' is not one of template, last, per_turn, drop"):
        encoder("all")


# ---------------------------------------------------------------------------------------- prompts
def compared(asked: ChatEncoder, sample: Sample) -> tuple[int, int, str]:
    made = list(asked.split_by_turn([sample]))
    notes = [one.notes for one in asked.encode_each(made, compare=len(made)) if isinstance(one, Encoded)]
    counts = [sum(n[name].count for n in notes if name in n) for name in ("prompts_compared", "prompts_differ")]
    example = next((n["prompts_differ"].example for n in notes if "prompts_differ" in n), "")
    return counts[0], counts[1], example


OPENS = TEMPLATES["qwen3"].replace(
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}",
)


def test_turns_are_compared_with_the_prompts_that_ask_for_them() -> None:
    assert compared(encoder("template", "chatml"), thought(inline=True)) == (2, 0, "")
    assert TEMPLATES["qwen3"] != OPENS
    asked = ChatEncoder(make_tokenizer(OPENS, SPECIAL))
    total, differing, example = compared(asked, thought())
    # The first turn's reasoning is left out in training, and a prompt begins it; the second's begins in both.
    assert (total, differing) == (2, 1)
    assert example == "before messages[1], the training sample has '', and the generation prompt '<think>\\n'"
    by_turn = ChatEncoder(make_tokenizer(OPENS, SPECIAL), reasoning="per_turn")
    assert compared(by_turn, thought()) == (2, 0, "")


def test_reports_have_counts_places_and_the_held_out_side_of_turns(tmp_path: Path) -> None:
    records = [{"messages": thought(f"F{i}", f"S{i}").messages} for i in range(40)]
    path = write_jsonl(tmp_path / "chats.jsonl", records)

    def build(policy: str, fraction: float = 0.0) -> Any:
        data = Data(phases=[Phase(sources=[Source(path=str(path))])], validation_fraction=fraction, reasoning=policy)
        return build_dataset(data, encoder(policy))

    (entry,) = build("template").report["sources"].values()
    assert entry["notes"]["reasoning_left_out"] == {"count": 40, "first": f"{path} line 1", "example": ""}
    assert entry["kept"] == 40
    split = build("per_turn", 0.4)
    trained, held = split.phases[0].pools[0].ids, split.validation[0].ids
    assert len(trained) + len(held) == 80 and len(held) > 0
    # Both turns of a conversation are on one side, and they are no copies of each other.
    sides = [{split.corpus.where(int(i)) for i in ids} for ids in (trained, held)]
    assert not sides[0] & sides[1] and 2 * len(sides[1]) == len(held)
    assert len(np.unique(split.corpus.content_hashes)) == 80

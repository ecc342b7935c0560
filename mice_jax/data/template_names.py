"""The names of the chat templates that come with the package, which are known without the imports of tokenizers."""

from pathlib import Path

from mice_jax.errors import UserError, did_you_mean

# The tokens that each writes, besides the tokenizer's own bos and eos.
TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "granite": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    "plain": (),
}
NAMES = ", ".join(TOKENS)


def check_template_name(name: str, given_as: str = "data.chat_template=") -> None:
    """Raises UserError where a name of a template is neither empty, nor that of a built-in one, nor a file.

    Args:
      name: The name.
      given_as: The field or flag that gives it, for the message.
    """
    if name and name not in TOKENS and not Path(name).exists():
        raise UserError(
            f"{given_as}{name!r} is neither the name of a built-in template ({NAMES}) nor an existing "
            f"file{did_you_mean(name, TOKENS, '.')}"
        )

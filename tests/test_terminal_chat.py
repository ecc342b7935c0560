"""The commands of a chat in the terminal, with a model that repeats the last message."""

import json
from pathlib import Path

import pytest

from mice_jax.errors import UserError
from mice_jax.inference.terminal_chat import COMMANDS, Message, TerminalChat

pytestmark = pytest.mark.smoke


def echo(messages: list[Message]) -> str:
    if "too long" in messages[-1]["content"]:
        raise UserError("the conversation has 9 tokens, and there is room for 8.")
    return f"{len(messages)}: {messages[-1]['content']}"


def contents(chat: TerminalChat) -> list[str]:
    return [message["content"] for message in chat.messages]


def test_messages_are_answered_and_remembered_until_cleared() -> None:
    chat = TerminalChat(echo, "Be a mouse.")
    assert chat.handle(" mice ") and chat.handle("") and chat.handle("red")
    assert contents(chat) == ["Be a mouse.", "mice", "2: mice", "red", "4: red"]
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.handle("/clear") and contents(chat) == ["Be a mouse."]


def test_system_message_is_replaced_or_removed_and_starts_over() -> None:
    chat = TerminalChat(echo)
    chat.handle("mice")
    assert chat.handle("/system Be an  elephant.") and contents(chat) == ["Be an  elephant."]
    assert chat.handle("/system") and contents(chat) == []


def test_message_that_is_too_long_is_left_out_of_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(echo)
    assert chat.handle("mice") and chat.handle("too long")
    assert contents(chat) == ["mice", "1: mice"]
    assert "room for 8. The message is left out; /clear starts over." in capsys.readouterr().err


def test_unknown_command_is_not_sent_to_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(echo)
    assert chat.handle("/cleer") and chat.messages == []
    assert "unknown command /cleer; did you mean '/clear'?" in capsys.readouterr().err


def test_help_lists_every_command_and_exit_ends_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(echo)
    assert chat.handle("/help") and not chat.handle("/exit") and not chat.handle("/quit")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*COMMANDS]


def test_saved_conversations_are_samples_of_a_jsonl_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(echo)
    chat.handle("mice é")
    file = tmp_path / "a b.jsonl"
    assert chat.handle(f"/save {file}") and chat.handle(f"/save {file}")
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        {"messages": chat.messages}
    ] * 2
    assert chat.handle("/save") and chat.handle(f"/save {tmp_path}")
    err = capsys.readouterr().err
    assert "/save needs the name of a file" in err and f"{tmp_path} cannot be written: Is a directory." in err

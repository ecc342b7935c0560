"""The chat in the terminal: what each line that the user types does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mice_jax.config_checks import nearest
from mice_jax.errors import UserError

Message = dict[str, Any]

# What `/help` prints, by command.
COMMANDS = {
    "/help": "show this list",
    "/clear": "start over, with the same system message",
    "/system": "TEXT: set the system message and start over; without TEXT, remove it",
    "/save": "FILE: append the conversation to a JSONL file, as a sample that can be trained on",
    "/exit": "end the chat; so does the end of the input",
}
QUIT = ("/exit", "/quit", "/bye")  # the first is listed; the others are what other chats call it
WELCOME = "A chat: /help lists the commands, /exit ends it."


class TerminalChat:
    """A conversation with the user.

    Attributes:
      messages: The conversation so far, a system message included.
    """

    def __init__(self, answer: Callable[[list[Message]], str], system: str = ""):
        """Starts a conversation.

        Args:
          answer: Prints and returns the answer to a conversation whose last message is the user's. It raises UserError
            where the conversation is too long or the chat template does not accept it.
          system: The system message; empty for none.
        """
        self._answer, self._system = answer, system
        self._clear()

    def _clear(self) -> None:
        self.messages: list[Message] = [{"role": "system", "content": self._system}] if self._system else []

    def handle(self, line: str) -> bool:
        """Handles a line that the user has typed; returns whether the chat goes on."""
        line = line.strip()
        if line.startswith("/"):
            return self._command(*line.split(maxsplit=1))
        if line:
            asked = [*self.messages, {"role": "user", "content": line}]
            try:
                self.messages = [*asked, {"role": "assistant", "content": self._answer(asked)}]
            except UserError as e:
                print(f"{e} The message is left out; /clear starts over.", file=sys.stderr)
        return True

    def _command(self, name: str, argument: str = "") -> bool:
        """Does what a command says. A command is never sent to the model, an unknown one neither."""
        if name == "/help":
            print("\n".join(f"{name:<8} {text}" for name, text in COMMANDS.items()))
        elif name in ("/clear", "/system"):
            self._system = argument if name == "/system" else self._system
            self._clear()
            print(f"A new conversation, with {'the' if self._system else 'no'} system message.")
        elif name == "/save":
            self._save(argument)
        elif name not in QUIT:
            print(f"unknown command {name}{nearest(name, COMMANDS)} Nothing was sent to the model.", file=sys.stderr)
        return name not in QUIT

    def _save(self, name: str) -> None:
        if not name:
            print("/save needs the name of a file.", file=sys.stderr)
            return
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as e:
            print(f"{name} cannot be written: {e.strerror}.", file=sys.stderr)
        else:
            print(f"{len(self.messages)} messages appended to {name}")


def run_chat(chat: TerminalChat) -> None:
    """Reads lines from the terminal until the user ends the chat."""
    print(WELCOME)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not chat.handle(line):
            return

"""Renders a conversation with a chat template, whole, and finds what of its text is trained.

Whatever the template would leave out is refused or counted: calls, tools, contents, reasoning and unknown keys.
"""

import functools
from dataclasses import dataclass, replace

from mice_jax.data import template_checks
from mice_jax.data.bad_records import BadRecord, BadRecordError
from mice_jax.data.call_arguments import has_other_text, with_object_arguments, with_text_arguments
from mice_jax.data.chat_template import ChatTemplate, Message, TemplateError, TemplateInputs
from mice_jax.data.reasoning import reasoning_of, without_reasoning
from mice_jax.data.sample_notes import UNREAD, Note
from mice_jax.data.sources import Sample
from mice_jax.data.template_spans import PROBE_MESSAGES, NoTurnEndError, TemplateSpans
from mice_jax.data.tokenizer import Span


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    sample: Sample
    messages: list[Message]  # as the template sees them
    text: str
    train_indices: list[int]  # indices of the messages that are trained
    spans: list[Span]  # of `text`, that are trained; mostly one for each message
    notes: dict[str, Note]


class ConversationRenderer:
    """Renders conversations with one chat template, by one rule of what is trained."""

    def __init__(self, template: ChatTemplate, spans: TemplateSpans, train_on: str, reasoning: str) -> None:
        """Sets up the rules.

        Args:
          template: the chat template.
          spans: finds the trained spans of texts that this template writes.
          train_on: "all" trains every assistant message, "last" only the last one.
          reasoning: what happens to reasoning, one of `reasoning.POLICIES`.
        """
        self.template, self._spans = template, spans
        self._train_on, self._reasoning = train_on, reasoning

    def render(self, sample: Sample) -> Rendered | BadRecord:
        """Returns the conversation's text and its trained spans, or why it cannot be used."""
        try:
            return self._render_whole(sample)
        except BadRecordError as e:
            return e.record
        except NoTurnEndError as e:
            text = f"{e}, so a model trained on it would never stop"
            advice = "Let the template write a token (such as the eos token) after each assistant message"
            return BadRecord(sample.where, "turn without an end", text, advice)
        except TemplateError as e:
            return self._refused(sample, "refused by the chat template", str(e))

    def _render_whole(self, sample: Sample) -> Rendered:
        notes: dict[str, Note] = {}
        if self._reasoning == "drop":
            sample = _drop_reasoning(sample, notes)
        messages, inputs = self.as_template_sees(sample.messages), inputs_of(sample)
        train_indices = self.messages_to_train(sample)
        # The tags of a template enclose the assistant's messages only.
        tagged: list[Span] | None = None
        if all(messages[i]["role"] == "assistant" for i in train_indices) and self.template.is_tagged(inputs.tools):
            text, tagged = self.template.render_with_spans(messages, inputs)
        else:
            text = self.template.render(messages, inputs)
        lost = template_checks.left_out(self.template, messages, inputs, text)
        if lost.tools or lost.calls:
            parts = [
                *(["its `tools`"] if lost.tools else []),
                *(f"the `tool_calls` of messages[{i}]" for i in lost.calls),
            ]
            raise BadRecordError(
                self._refused(
                    sample, "tools left out by the chat template", f"the chat template leaves out {' and '.join(parts)}"
                )
            )
        untold = [i for i in train_indices if i in lost.reasoning]
        if untold and self._reasoning == "last":
            train_indices = [i for i in train_indices if i not in untold]
            notes["reasoning_untrained"] = Note(len(untold))
        elif untold:
            notes["reasoning_left_out"] = Note(len(untold))
        if lost.contents:
            notes["content_left_out"] = Note(len(lost.contents))
        spans = self._spans_of(sample, messages, inputs, text, tagged, train_indices) if train_indices else []
        self._note_oddities(sample, messages, train_indices, notes)
        return Rendered(sample, messages, text, train_indices, spans, notes)

    def _spans_of(
        self,
        sample: Sample,
        messages: list[Message],
        inputs: TemplateInputs,
        text: str,
        tagged: list[Span] | None,
        train_indices: list[int],
    ) -> list[Span]:
        """The trained spans of a rendered conversation."""
        if tagged is not None:
            return self._spans.from_tags(messages, text, tagged, train_indices)
        try:
            return self._spans.derive(messages, inputs, text, train_indices)
        except TemplateError as e:
            told = f"the trained tokens cannot be derived from the chat template: {e}"
            advice = (
                "Put {% generation %} before and {% endgeneration %} after the assistant's turn (its content and the "
                "token that ends it) in a copy of the template, and give that file as data.chat_template"
            )
            raise BadRecordError(BadRecord(sample.where, "trained tokens unknown", told, advice)) from e

    def _refused(self, sample: Sample, reason: str, text: str) -> BadRecord:
        """A conversation that the template cannot render whole, with the built-in templates that can."""
        messages, inputs = self.as_template_sees(sample.messages), inputs_of(sample)
        advice = []
        if self._renders_without_nulls(messages, inputs):
            nulls = [f"messages[{i}]" for i, m in enumerate(messages) if "content" not in m]
            text += f". It fails where `content` is null ({', '.join(nulls)})"
            advice.append('give such messages "content": "", or write (message.content or \'\') in the template')
        special = any(m["role"] == "tool" or m.get("tool_calls") or reasoning_of(m) for m in messages)
        if inputs.tools or special or advice:
            names = template_checks.built_in_that_render(self.template, messages, inputs)
            renders = "renders it" if len(names) == 1 else "render it"
            if names:
                advice.append(f"take {template_checks.any_of(names)}, which {renders}, as data.chat_template")
            else:
                advice.append("take it out of the data, since no built-in template renders it")
        return BadRecord(sample.where, reason, text, ", or ".join(advice))

    def _renders_without_nulls(self, messages: list[Message], inputs: TemplateInputs) -> bool:
        """Whether the template fails for these messages, and would not if their missing contents were empty texts."""
        if all("content" in m for m in messages):
            return False
        try:
            self.template.render(messages, inputs)
        except TemplateError:
            try:
                self.template.render([{"content": ""} | m for m in messages], inputs)
            except TemplateError:
                return False
            return True
        return False

    # ------------------------------------------------------------------------------------ notes
    def _note_oddities(
        self, sample: Sample, messages: list[Message], train_indices: list[int], notes: dict[str, Note]
    ) -> None:
        """Counts what is odd about a conversation and no error."""
        for key in template_checks.unread_keys(self.template, sample):
            notes[UNREAD + key] = Note(1)
        answers = [messages[i] for i in train_indices if messages[i]["role"] == "assistant"]
        empty = sum(not (m.get("content") or m.get("tool_calls") or reasoning_of(m)) for m in answers)
        if empty:
            notes["empty_answer"] = Note(empty)
        thoughtless = sum("</think>" in (m.get("content") or "") and reasoning_of(m) == "" for m in answers)
        if thoughtless:
            notes["empty_think"] = Note(thoughtless)
        texts = sum(has_other_text(call) for m in sample.messages for call in m.get("tool_calls") or [])
        if texts:
            notes["arguments_not_json"] = Note(texts)

    def as_template_sees(self, messages: list[Message]) -> list[Message]:
        """Returns the messages as a template sees them.

        They are without nulls, as in transformers, and without our key `train`. Arguments of calls that are the text of
        a JSON object are that object, which templates write as JSON, unless the template needs texts.
        """
        seen = [{k: v for k, v in m.items() if v is not None and k != "train"} for m in messages]
        for i, message in enumerate(seen):
            if message.get("tool_calls"):
                form = with_text_arguments if self._needs_text_arguments else with_object_arguments
                seen[i] = message | {"tool_calls": [form(call) for call in message["tool_calls"]]}
        return seen

    @functools.cached_property
    def _needs_text_arguments(self) -> bool:
        """Whether the template fails for arguments that are objects, and not for their texts."""
        works = []
        for arguments in ({"a": 1}, '{"a": 1}'):
            call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
            try:
                self.template.render([PROBE_MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}])
                works.append(True)
            except TemplateError:
                works.append(False)
        return works == [False, True]

    def messages_to_train(self, sample: Sample) -> list[int]:
        """Returns the indices of the messages to train on."""
        roles = [m["role"] for m in sample.messages]
        if sample.unmask:
            default = {i for i, role in enumerate(roles) if role != "system"}
        else:
            default = {i for i, role in enumerate(roles) if role == "assistant"}
            if default and self._train_on == "last":
                default = {max(default)}
        return [i for i, m in enumerate(sample.messages) if m.get("train", i in default)]


def inputs_of(sample: Sample) -> TemplateInputs:
    """Returns what a template gets besides the messages of a sample."""
    return TemplateInputs(sample.tools, sample.documents, sample.template_kwargs)


def _drop_reasoning(sample: Sample, notes: dict[str, Note]) -> Sample:
    messages = [without_reasoning(m) for m in sample.messages]
    dropped = sum(m != before for m, before in zip(messages, sample.messages, strict=True))
    if dropped:
        notes["reasoning_dropped"] = Note(dropped)
    return replace(sample, messages=messages)

"""What a row of data says, whatever its format was: a conversation, a preference, labels."""

from dataclasses import dataclass
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
Label = str | int | float


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: one of ROLES.
        content: the text; empty for an answer that only calls tools.
        reasoning: what an assistant thought before its answer, for templates that show it.
        tool_calls: calls of an assistant in OpenAI's form, `arguments` as objects.
        name, call_id: of a tool's result: the tool, and the call that it answers.
        trained: False for an answer that is context only.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str = ""
    call_id: str = ""
    trained: bool = True

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it, without the fields that are empty."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            fields["reasoning_content"] = self.reasoning
        if self.tool_calls:
            fields["content"] = self.content or None
            fields["tool_calls"] = list(self.tool_calls)
        if self.name:
            fields["name"] = self.name
        if self.call_id:
            fields["tool_call_id"] = self.call_id
        return fields


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation or text to learn from.

    Attributes:
        messages: the last one is the assistant's. A text to learn as a whole is one answer.
        tools: descriptions of the tools that may be called, in OpenAI's form.
        raw: the messages are joined as they are, without a chat template.
        origin: the row that it comes from ("file:line").
    """

    messages: tuple[Message, ...]
    origin: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    raw: bool = False

    @property
    def has_answer(self) -> bool:
        """Whether an answer says or calls something."""
        answers = (message for message in self.messages if message.role == "assistant")
        return any(answer.content.strip() or answer.tool_calls for answer in answers)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two endings of one conversation, of which the first is preferred; fields as in Example."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Rated:
    """A conversation whose last answer is good or bad (for KTO); fields as in Example."""

    messages: tuple[Message, ...]
    good: bool
    origin: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Classified:
    """One text, or a pair, and its class (a name or a number), its classes, or its scores.

    `label` is a class; a float, which is a score; or a tuple of classes, of scores or of a 0.0 or
    1.0 for each class.
    """

    texts: tuple[str, ...]
    label: Label | tuple[Label, ...]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, each with its class (a name or a number)."""

    words: tuple[str, ...]
    tags: tuple[str | int, ...]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Extractive:
    """A question and the text that holds its answer, `answer`, from character `start` on.

    Without an answer `start` is -1. `others` are answers that are right as well.
    """

    question: str
    context: str
    answer: str
    start: int
    others: tuple[str, ...] = ()
    origin: str = ""


Labelled = Classified | Tagged | Extractive
Parsed = Example | Preference | Rated | Labelled
KINDS: dict[type, str] = {
    Example: "conversations or texts",
    Preference: "preferences",
    Rated: "rated answers",
    Classified: "labels of texts",
    Tagged: "labels of words",
    Extractive: "answers in a context",
}
# What the kinds of rows that are trained on are for.
OBJECTIVES: dict[type, str] = {
    Example: "sft",
    Classified: "sequence_classification",
    Tagged: "token_classification",
    Extractive: "question_answering",
}

"""What a model is asked: texts, and questions that come after its cache has been cut."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Question:
    """A prompt, and the answer wanted after it. The prompt may be empty: then the answer continues the context."""

    prompt: str
    answer: str


@attrs.frozen(kw_only=True)
class Item:
    """A context that is read, and questions that are asked one after another, each after the right answers before.

    known: whether the first question's prompt is read before the cache is cut, so that what is needed is known then;
    such an item has one question.
    """

    context: str
    questions: tuple[Question, ...]
    known: bool = False


@attrs.frozen(kw_only=True)
class Task:
    """Items of one kind, all judged alike.

    judged_by: "answers", the share of answers whose every token is the most likely one; "bits", of the answers, a
    token.
    """

    name: str
    items: tuple[Item, ...]
    judged_by: str = "answers"

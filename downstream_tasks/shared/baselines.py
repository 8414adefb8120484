"""What a trained model is compared with."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from downstream_tasks.shared.examples import Item


def most_common(answers: Sequence[str]) -> str:
    """The answer that is right most often."""
    return Counter(answers).most_common(1)[0][0]


def bag_of_words(train: Sequence[Item], held_out: Sequence[Item]) -> list[str]:
    """The answers of a logistic regression on tf-idf of words and signs."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # here: it takes a second
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", sublinear_tf=True)
    classifier = make_pipeline(words, LogisticRegression(max_iter=1000, C=10.0))
    classifier.fit([item.context for item in train], [item.answer for item in train])
    return [str(answer) for answer in classifier.predict([item.context for item in held_out])]


def looked_up(train: Sequence[Item], held_out: Sequence[Item]) -> list[str]:
    """The answer that the same question had most often in training, or the most common answer of all."""
    known: dict[str, Counter[str]] = {}
    for item in train:
        known.setdefault(item.question, Counter())[item.accepted[0]] += 1
    otherwise = most_common([item.accepted[0] for item in train])
    return [known[item.question].most_common(1)[0][0] if item.question in known else otherwise for item in held_out]


def best_line(held_out: Sequence[Item]) -> list[str]:
    """The line of the context that shares the most words with the question, as it stands; of equal ones the first."""
    return [_best_line(item) for item in held_out]


def _best_line(item: Item) -> str:
    asked = _words(item.question)
    lines = [line for line in item.context.splitlines() if line.strip()] or [""]
    return max(lines, key=lambda line: len(asked & _words(line))).strip()


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


class Grams:
    """How often tokens follow up to order - 1 others, smoothed by how many different ones do.

    Source: Witten and Bell, The zero-frequency problem, 1991, method C, as interpolated n-grams.
    """

    def __init__(self, texts: Iterable[Sequence[int]], *, order: int) -> None:
        self._order = order
        followed: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for end, token in enumerate(text):
                for length in range(min(order, end + 1)):
                    followed[tuple(text[end - length : end])][token] += 1
        self._seen = {before: (counts, counts.total()) for before, counts in followed.items()}

    def perplexity(self, texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> float:
        """Of tokens, each text's after those that come before it."""
        cost, tokens = 0.0, 0
        for before, text in texts:
            read, most = [*before, *text], self._order - 1
            for end in range(len(before), len(read)):
                cost -= math.log(self._probability(read[max(0, end - most) : end], read[end]))
            tokens += len(text)
        return math.exp(cost / max(1, tokens))

    def _probability(self, before: Sequence[int], token: int) -> float:
        known, _ = self._seen[()]
        probability = 1 / (len(known) + 1)  # one more than were seen, for all that were not
        for length in range(len(before) + 1):
            found = self._seen.get(tuple(before[len(before) - length :]))
            if found is None:
                break
            counts, total = found
            probability = (counts[token] + len(counts) * probability) / (total + len(counts))
        return probability

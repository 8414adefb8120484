"""When two caches answer alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.utils import GenerateOutput

from pikv.testing.transformers.operations import Answer


def assert_close(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise AssertionError unless shapes and dtypes are the same and entries differ by `tolerance` at most."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    error = float((got - expected).abs().max()) if got.numel() else 0.0
    assert error <= tolerance, f"{what}: off by {error:.2g}, at most {tolerance:.2g} is allowed"


def assert_same_answers(got: Sequence[Answer], expected: Sequence[Answer], tolerance: float, what: str) -> None:
    """Raise AssertionError, naming the first operation after which the answers or the lengths differ."""
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        step = f"{what}, operation {index}, {other.operation}"
        assert one.length == other.length, f"{step}: a length of {one.length}, expected {other.length}"
        for tensor, reference in zip(one.shown, other.shown, strict=True):
            assert_close(tensor, reference, tolerance, step)


def assert_same_generation(got: GenerateOutput, expected: GenerateOutput, tolerance: float, what: str) -> None:
    """Raise AssertionError unless rows have the same tokens and logits, up to where the best two logits nearly tie."""
    steps = len(expected.logits)
    assert len(got.logits) == steps, f"{what}: {len(got.logits)} new tokens, expected {steps}"
    alike = torch.ones(len(expected.sequences), dtype=torch.bool)
    for step, (logits, reference) in enumerate(zip(got.logits, expected.logits, strict=True)):
        assert_close(logits[alike], reference[alike], tolerance, f"{what}, new token {step}")
        column = step - steps
        differ = alike & (got.sequences[:, column] != expected.sequences[:, column])
        best, second = reference.topk(2).values.unbind(-1)
        tied = best - second < tolerance
        assert not (differ & ~tied).any(), f"{what}: another token at step {step} in rows {differ.nonzero().tolist()}"
        alike &= ~differ


def assert_same_beams(got: GenerateOutput, expected: GenerateOutput, tolerance: float, what: str) -> None:
    """Raise AssertionError unless the scores of all beams are the same, and the beams where scores do not tie."""
    assert_close(got.sequences_scores, expected.sequences_scores, tolerance, f"{what}, scores")
    scores = expected.sequences_scores
    for index in range(len(scores)):
        alone = (scores[index] - torch.cat([scores[:index], scores[index + 1 :]])).abs().min() > tolerance
        same = torch.equal(got.sequences[index], expected.sequences[index])
        assert same or not alone, f"{what}: beam {index} has other tokens"


def rounding_error(got: Sequence[Answer], truth: Sequence[Answer]) -> float:
    """The root of the mean square difference of all answers."""
    one, other = (torch.cat([each for answer in answers for each in answer.shown]) for answers in (got, truth))
    return float((one - other).square().mean().sqrt())

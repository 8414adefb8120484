"""The facts about a cache in front of a model that is called directly."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from transformers import Cache

from pikv.testing.policy import inherited
from pikv.testing.transformers.comparison import assert_same_answers, rounding_error
from pikv.testing.transformers.dialogue import ModelDialogue
from pikv.testing.transformers.hooks import LEFT, RIGHT, CacheHooks, answers, reference
from pikv.testing.transformers.models import half_llama, llama
from pikv.testing.transformers.operations import Answer, Crop, Feed, Program, Reorder, Repeat, Select
from pikv.testing.transformers.programs import programs


class ForwardConformance(CacheHooks):
    """Prompts, chunks, padding; rows and columns that move."""

    def test_it_is_a_cache(self) -> None:
        """`make` makes a `transformers.Cache`, empty and a new one each time."""
        for model in self.models():
            with self.prepare(model):
                cache, other = self.make(model), self.make(model)
                assert isinstance(cache, Cache), f"{type(cache).__name__} does not derive from transformers.Cache"
                assert cache is not other, "make() twice gave the same cache"
                assert int(cache.get_seq_length()) == 0, f"a new cache has a length of {cache.get_seq_length()}"

    def test_a_prompt(self) -> None:
        """A prompt gets the logits that it gets from a DynamicCache."""
        self.check(Feed(33))

    def test_single_tokens(self) -> None:
        """Tokens that come one by one attend to all before."""
        self.check(Feed(7), *[Feed(1)] * 12)

    def test_chunks(self) -> None:
        """Chunks of several tokens attend to all before and causally to themselves, whatever their sizes."""
        self.check(Feed(1), Feed(5), Feed(2), Feed(66), Feed(1), Feed(17), Feed(3))

    def test_a_long_dialogue(self) -> None:
        """Nothing is lost or rounded away over 200 tokens."""
        self.check(Feed(70), *[Feed(1)] * 66, Feed(30), *[Feed(1)] * 40, batch=2)

    def test_left_padding(self) -> None:
        """Rows of unequal lengths, padded on the left, do not attend to their padding."""
        self.check(Feed(8, LEFT), Feed(1), Feed(1), Feed(4))

    def test_right_padding(self) -> None:
        """Nor do rows that are padded on the right and go on after it."""
        self.check(Feed(8, RIGHT, "right"), Feed(1), Feed(1), Feed(4))

    def test_padding_between_turns(self) -> None:
        """Later chunks may be padded too, all of a row but its last token."""
        self.check(Feed(8, LEFT), Feed(1), Feed(5, RIGHT, "right"), Feed(1), Feed(6, (5, 0, 3)), Feed(2))

    def test_length_is_what_was_shown(self) -> None:
        """`get_seq_length` counts the columns shown, padding and what was evicted among them."""
        program = Program((Feed(8, LEFT), Feed(1), Feed(1), Feed(40), Feed(5, RIGHT, "right"), *[Feed(1)] * 20))
        for model in self.models():
            for got, expected in zip(*self.both(model, partial(answers, model, program)), strict=True):
                what = f"{type(model).__name__}, after {expected.operation}"
                assert got.length == expected.length, f"{what}: a length of {got.length}, expected {expected.length}"

    def test_reorder(self) -> None:
        """After `reorder_cache` row i goes on as row `index[i]` was; a row may be wanted twice or not at all."""
        back_and_forth = (Reorder((2, 0, 0)), Feed(1), Reorder((1, 1, 2)), Feed(1), Reorder((0, 1, 2)), Feed(4))
        self.check(Feed(9, LEFT), Feed(1), *back_and_forth)
        self.check(Feed(9, LEFT), *back_and_forth)

    def test_select(self) -> None:
        """`batch_select_indices` keeps the rows asked for, in that order."""
        self.check(Feed(9, LEFT), Feed(1), Select((2, 0)), Feed(1), Select((1,)), Feed(3))

    def test_repeat(self) -> None:
        """`batch_repeat_interleave` puts the copies of a row side by side, and they go on apart."""
        self.check(Feed(9, (0, 4)), Repeat(2), Feed(1), Feed(3), Reorder((3, 1, 2, 0)), Feed(1), batch=2)

    def test_crop(self) -> None:
        """`crop(-n)` forgets the newest n columns, out of any chunk, and others come in their place."""
        self.check(Feed(40, LEFT), Feed(1), Feed(1), Crop(1), Feed(5), Crop(8), Feed(3), Crop(30), Feed(1), Feed(2))
        self.check(Feed(40, LEFT), Crop(1), Feed(1))

    def test_crop_into_padding(self) -> None:
        """Columns count, also those that are padding in some row."""
        self.check(Feed(8, RIGHT, "right"), Crop(3), Feed(1), Feed(7, LEFT[::-1]), Crop(4), Feed(3))

    @inherited
    @given(program=programs())
    def test_any_program(self, program: Program) -> None:
        """Any mixture of all this."""
        self.check_program(program)

    def test_bfloat16(self) -> None:
        """In bfloat16 logits are no farther from the float32 model's than twice as far as DynamicCache's are."""
        program = Program((Feed(40, LEFT), *[Feed(1)] * 8, Feed(9), Feed(1)))
        truth = answers(llama(), program, reference(llama()))
        both = self.both(half_llama(), partial(answers, half_llama(), program))
        got, expected = (rounding_error(each, truth) for each in both)
        limit = 2 * expected + self.logit_tolerance
        assert got <= limit, f"off by {got:.2g} (root of the mean square), at most {limit:.2g} is allowed"

    def test_two_caches_stand_alone(self) -> None:
        """Two caches of one model that are used in turns do not know of each other."""
        both = Program((Feed(5), Feed(1), Feed(2)), seed=1), Program((Feed(9), Feed(3), Feed(1)), seed=2)
        for model in self.models():
            alone = [answers(model, program, reference(model)) for program in both]
            with self.prepare(model):
                talks = [ModelDialogue.start(model, self.make(model), program) for program in both]
                steps = zip(*(program.operations for program in both), strict=True)
                mixed = [[Answer.to(each, talk) for each, talk in zip(step, talks, strict=True)] for step in steps]
            for got, expected in zip(zip(*mixed, strict=True), alone, strict=True):
                assert_same_answers(got, expected, self.logit_tolerance, type(model).__name__)

    def test_the_model_is_given_back(self) -> None:
        """After `prepare` the model gives the very logits that it gave before."""
        program = Program((Feed(8, LEFT), Feed(1)))
        for model in self.models():
            before = answers(model, program, reference(model))
            with self.prepare(model):
                answers(model, program, self.make(model))
            after = answers(model, program, reference(model))
            assert_same_answers(after, before, 0.0, f"{type(model).__name__} afterwards")

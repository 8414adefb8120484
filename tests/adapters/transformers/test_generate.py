"""Whatever one does with a cache in transformers, done with PiKV's."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers

import pikv
from pikv.adapters.transformers import attach
from pikv.testing.transformers.models import cache_argument


def test_sampling(mixtral, prompt, plain, pikv_talk):
    """The same draws give the same tokens."""
    torch.manual_seed(3)
    expected = plain(mixtral).says(*prompt, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(pikv_talk(mixtral).says(*prompt, do_sample=True, top_k=20).sequences, expected.sequences)


def test_several_answers_to_each_prompt(mixtral, prompt, plain, pikv_talk):
    """Sampled side by side from one batch."""
    settings = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(3)
    expected = plain(mixtral).says(*prompt, **settings)
    torch.manual_seed(3)
    assert torch.equal(pikv_talk(mixtral).says(*prompt, **settings).sequences, expected.sequences)


def test_streaming(mixtral, pad, plain, pikv_talk):
    """Tokens arrive one by one."""

    class Collect(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.parts = []

        def put(self, value):
            self.parts.append(value.flatten())

        def end(self):
            self.parts.append(torch.tensor([], dtype=torch.int64))

    collect = Collect()
    expected = plain(mixtral).says(*pad(20, [0]))
    pikv_talk(mixtral).says(*pad(20, [0]), streamer=collect)
    assert len(collect.parts) == 18
    assert torch.equal(torch.cat(collect.parts), expected.sequences[0])


def test_embeddings_instead_of_tokens(mixtral, prompt, plain, pikv_talk, alike):
    """A prompt given as inputs_embeds."""
    ids, mask = prompt
    embeddings = mixtral.get_input_embeddings()(ids).detach()
    expected = plain(mixtral).says(None, mask, inputs_embeds=embeddings)
    alike(pikv_talk(mixtral).says(None, mask, inputs_embeds=embeddings), expected)


def test_prefill_in_chunks(mixtral, pad, plain, pikv_talk, alike):
    """By generate itself. Where transformers 5.2 counts positions wrongly, it does so with any cache."""
    expected = plain(mixtral).says(*pad(50, [0]), prefill_chunk_size=16)
    alike(pikv_talk(mixtral).says(*pad(50, [0]), prefill_chunk_size=16), expected)


@pytest.mark.parametrize("family", ["mixtral", "mixtral, sliding", "gemma3, mixed"])
def test_drafts_of_an_assistant(family, models, random_model, pad, plain, pikv_talk):
    """Assisted decoding crops what was drafted and not accepted; greedy, so the answer is the model's own."""
    model, assistant = models(family), random_model("llama")
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    expected = plain(model).says(*pad(20, [0]), max_new_tokens=60)
    said = pikv_talk(model).says(*pad(20, [0]), max_new_tokens=60, assistant_model=assistant)
    assert torch.equal(said.sequences, expected.sequences)


@pytest.mark.parametrize("family", ["mixtral", "mixtral, sliding"])
def test_drafts_from_the_prompt(family, models, pad, plain, pikv_talk):
    """Prompt lookup drafts what followed the last time."""
    ids, mask = pad(10, [0])
    ids, mask = ids.repeat(1, 3), mask.repeat(1, 3)
    settings = {"max_new_tokens": 60, "eos_token_id": 96}
    expected = plain(models(family)).says(ids, mask, **settings)
    said = pikv_talk(models(family)).says(ids, mask, **settings, prompt_lookup_num_tokens=6)
    assert torch.equal(said.sequences, expected.sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, random_model, prompt, plain, pikv_talk):
    """Logits as near to float32 ones as DynamicCache's are."""
    ids, mask = prompt
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    exact = plain(random_model("llama")).logits(**inputs)
    model = random_model("llama").to(dtype)
    theirs, ours = (talk.logits(**inputs).float() for talk in (plain(model), pikv_talk(model)))
    real = mask.bool()
    assert (ours - exact)[real].abs().mean() < 1.2 * (theirs - exact)[real].abs().mean()


def test_a_batch_that_is_cut_and_repeated(mixtral, prompt, plain, pikv_talk):
    """batch_select_indices, batch_repeat_interleave and crop, then on."""
    ids, mask = prompt
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    answers = []
    for talk in (plain(mixtral), pikv_talk(mixtral)):
        talk.logits(input_ids=ids, attention_mask=mask, position_ids=places)
        talk.cache.batch_select_indices(torch.tensor([2, 0]))
        talk.cache.batch_repeat_interleave(2)
        talk.cache.crop(-4)
        assert talk.cache.get_seq_length() == 36
        rows = [2, 2, 0, 0]
        last = {"input_ids": ids[rows, 36:], "position_ids": places[rows, 36:]}
        answers.append(talk.logits(attention_mask=mask[rows], **last))
    torch.testing.assert_close(answers[1], answers[0], atol=1e-4, rtol=1e-4)


def test_a_cache_that_is_reset_starts_anew(mixtral, prompt, pad, pikv_talk):
    """With another batch."""
    talk = pikv_talk(mixtral)
    first = talk.says(*pad(12, [0]))
    talk.cache.reset()
    talk.says(*prompt)
    talk.cache.reset()
    assert torch.equal(talk.says(*pad(12, [0])).sequences, first.sequences)


@pytest.mark.parametrize("copied", [lambda cache: cache.fork(), copy.deepcopy])
def test_a_prefix_is_read_once_and_gone_on_from(copied, mixtral, pad, plain, pikv_talk, alike):
    """A copy shares the sealed pages; the cache that it was made from stays as it is."""
    ids, mask = pad(50, [0, 9])
    talk = pikv_talk(mixtral)
    talk.logits(
        input_ids=ids[:, :40], attention_mask=mask[:, :40], position_ids=(mask.cumsum(-1) - 1)[:, :40].clamp(min=0)
    )
    first, talk.cache = talk.cache, copied(talk.cache)
    alike(talk.says(ids, mask), plain(mixtral).says(ids, mask))
    assert first.get_seq_length() == 40


@pytest.mark.parametrize("names", [{}, {"router": "top_k"}])
def test_pages_are_free_when_a_cache_is_forgotten(names, mixtral, prompt):
    """At once, without the garbage collector."""
    with attach(mixtral, {"page_size": 16, "tail_tokens": 16, **names}) as host, torch.no_grad():
        pool = pikv.PagePool(host.model, host.runtime)
        cache = host.new_cache(pool=pool)
        mixtral(input_ids=prompt[0], **{cache_argument(mixtral): cache})
        assert pool.used_bytes > 0
        del cache
    assert pool.used_bytes == 0


def test_two_models_and_two_caches_each(models, prompt, plain):
    """In threads, at the same time: nothing is shared but the registration."""
    families = ["mixtral", "gemma3, mixed"]
    expected = [plain(models(family)).says(*prompt).sequences for family in families]
    said = {}
    hosts = [attach(models(family), {"page_size": 16, "tail_tokens": 16}) for family in families]

    def speak(number, host, model):
        said[number] = model.generate(
            prompt[0], attention_mask=prompt[1], max_new_tokens=16, do_sample=False, pad_token_id=0,
            **{cache_argument(model): host.new_cache()},
        )  # fmt: skip

    threads = [
        threading.Thread(target=speak, args=(number, hosts[number % 2], models(families[number % 2])))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for host in hosts:
        host.detach()
    assert all(torch.equal(said[number], expected[number % 2]) for number in range(4))


def test_an_attached_model_goes_on_with_other_caches_and_without(mixtral, prompt, plain):
    """A DynamicCache, no cache, and a gradient."""
    ids, mask = prompt
    expected = plain(mixtral).says(*prompt)
    with attach(mixtral):
        assert torch.equal(plain(mixtral).says(*prompt).sequences, expected.sequences)
        mixtral(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert mixtral.base_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    mixtral.zero_grad()


def test_detach_gives_the_model_back(mixtral, prompt, plain):
    """No hook, no other attention; and attaching again works."""
    before = mixtral.config._attn_implementation
    hooks = len(mixtral.base_model._forward_hooks), len(mixtral.base_model._forward_pre_hooks)
    expected = plain(mixtral).says(*prompt)
    for _ in range(2):
        host = attach(mixtral)
        host.detach()
        host.detach()
    assert mixtral.config._attn_implementation == before
    assert (len(mixtral.base_model._forward_hooks), len(mixtral.base_model._forward_pre_hooks)) == hooks
    assert all(torch.equal(*pair) for pair in zip(plain(mixtral).says(*prompt).logits, expected.logits, strict=True))

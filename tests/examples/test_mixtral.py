from __future__ import annotations

import json

import pytest
import torch

from pikv import InputError
from pikv.core.ports.transport import Solo
from pikv.testing.transport import run_ranks

pytest.importorskip("safetensors", reason="no safetensors: pip install pikv[mpi]")

from mixtral import DenseCache, Mixtral

VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 5},
    "head_dim": {"head_dim": 16},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
}


def step_by_step(folder, transport, ids, chunks):
    """The decoder's logits after each chunk of ids [batch, tokens]: [chunks, batch, vocabulary]."""
    model = Mixtral(folder, transport)
    cache = DenseCache(model.config)
    starts = [sum(chunks[:number]) for number in range(len(chunks))]
    parts = ids.split(chunks, dim=1)
    return torch.stack([model.step(part, start, cache) for part, start in zip(parts, starts, strict=True)])


@pytest.fixture
def ids():
    return torch.randint(60, (2, 17), generator=torch.Generator().manual_seed(1))


CHUNKS = [9, 1, 1, 5, 1]
ENDS = [8, 9, 10, 15, 16]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path, save_mixtral, ids, settings):
    """After every chunk, whatever the variant of the format."""
    with torch.no_grad():
        expected = save_mixtral(tmp_path, **settings)(ids).logits[:, ENDS].transpose(0, 1)
    torch.testing.assert_close(step_by_step(tmp_path, Solo(), ids, CHUNKS), expected, rtol=0, atol=1e-4)


def test_float16_weights_are_computed_in_float32(tmp_path, save_mixtral, ids):
    """A checkpoint in half precision gives the logits of its upcast weights."""
    with torch.no_grad():
        expected = save_mixtral(tmp_path, dtype=torch.float16)(ids).logits[:, ENDS].transpose(0, 1)
    torch.testing.assert_close(step_by_step(tmp_path, Solo(), ids, CHUNKS), expected, rtol=0, atol=1e-4)


def test_older_configs_name_rope_theta_at_the_top(tmp_path, save_mixtral, ids):
    """Versions of transformers before 5 wrote rope_theta beside the rest."""
    save_mixtral(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e3})
    expected = step_by_step(tmp_path, Solo(), ids, CHUNKS)
    edit_config(tmp_path, rope_parameters=None, rope_theta=5e3)
    assert torch.equal(step_by_step(tmp_path, Solo(), ids, CHUNKS), expected)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_the_experts_compute_the_same(tmp_path, save_mixtral, ids, size):
    """All ranks get the logits of one rank that has all experts."""
    save_mixtral(tmp_path)
    expected = step_by_step(tmp_path, Solo(), ids[:1], CHUNKS)
    for logits in run_ranks(size, lambda transport: step_by_step(tmp_path, transport, ids[:1], CHUNKS)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_rank_holds_its_own_experts_only(tmp_path, save_mixtral):
    """Five experts over two ranks: three and two."""
    save_mixtral(tmp_path)
    expert = 2 * 3 * 32 * 48 * 4  # layers, matrices, hidden, intermediate, bytes
    held = run_ranks(2, lambda transport: Mixtral(tmp_path, transport).expert_bytes())
    assert held == [3 * expert, 2 * expert]


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_kind_of_model_is_refused(tmp_path, save_mixtral):
    """The error says what was found."""
    save_mixtral(tmp_path)
    edit_config(tmp_path, model_type="llama")
    with pytest.raises(InputError, match="'llama'"):
        Mixtral(tmp_path, Solo())


def test_scaled_rotary_is_refused(tmp_path, save_mixtral):
    """It would be computed wrongly."""
    save_mixtral(tmp_path)
    edit_config(tmp_path, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    with pytest.raises(InputError, match="'yarn'"):
        Mixtral(tmp_path, Solo())


def test_a_folder_without_a_model_is_refused(tmp_path):
    """The error names the folder."""
    with pytest.raises(InputError, match=str(tmp_path)):
        Mixtral(tmp_path, Solo())


def test_a_config_without_sizes_is_refused(tmp_path):
    """The error names what is missing."""
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(InputError, match="num_attention_heads"):
        Mixtral(tmp_path, Solo())


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, save_mixtral):
    """Such as the pointer that git leaves where large files were not fetched."""
    save_mixtral(tmp_path)
    min(tmp_path.glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="cannot be read"):
        Mixtral(tmp_path, Solo())


def test_a_missing_shard_is_refused(tmp_path, save_mixtral):
    """The error names the file."""
    save_mixtral(tmp_path)
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="safetensors, which is missing"):
        Mixtral(tmp_path, Solo())


def test_a_missing_weight_is_refused(tmp_path, save_mixtral):
    """More experts in config.json than in the files."""
    save_mixtral(tmp_path)
    edit_config(tmp_path, num_local_experts=6)
    with pytest.raises(InputError, match=r"no .*experts\.5"):
        Mixtral(tmp_path, Solo())

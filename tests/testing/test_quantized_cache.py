"""What the suite for caches finds in transformers' own QuantizedCache: which facts hold, and which do not."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers is missing: pip install pikv[transformers]")
import transformers
from packaging.version import Version
from transformers import QuantizedCache

from pikv.testing.transformers import DenseCacheConformance

pytestmark = pytest.mark.peers

BACKENDS = {
    "optimum.quanto": {"backend": "quanto", "nbits": 4},
    "hqq": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
}
FACTS = sorted(name for name in dir(DenseCacheConformance) if name.startswith("test_"))
BROKEN = {
    "test_a_token_is_rounded_at_most_once",
    "test_any_program",
    "test_any_program_of_updates",
    "test_assisted_generate",
    "test_crop",
    "test_crop_into_padding",
    "test_repeat",
    "test_select",
    "test_stored_rows_and_columns_move",
}
BROKEN_ONCE = {"test_beam_search", "test_reorder"}  # mended by 5.24


class Quantized(DenseCacheConformance):
    logit_tolerance = state_tolerance = 3.5  # four bits are coarse; a row too many is an error all the same

    def __init__(self, arguments):
        self.arguments = arguments

    def make(self, model):
        return QuantizedCache(config=model.config, q_group_size=16, **self.arguments)


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("package", BACKENDS)
def test_quantized_cache(package, fact):
    """Prompts, chunks, padding and turns are right; moving rows and columns is not, and tokens are rounded anew."""
    pytest.importorskip(package, reason=f"the back end {package} of QuantizedCache is not installed")
    broken = BROKEN if Version(transformers.__version__) >= Version("5.24") else BROKEN | BROKEN_ONCE
    test = getattr(Quantized(BACKENDS[package]), fact)
    if fact not in broken:
        test()
        return
    with pytest.raises((AssertionError, ExceptionGroup, IndexError, RuntimeError, ValueError)):
        test()

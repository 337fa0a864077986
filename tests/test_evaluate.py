import copy

import pytest
import torch
from test_model import SMALL, random_ids, random_model

from plaingpt.evaluate import log_probabilities
from plaingpt.generate import Decoder


@pytest.mark.parametrize("length", [2, 3, 12, 13, 14, 18, 19, 20, 50])
def test_log_probabilities_are_the_models_in_windows_that_overlap_by_half(length):
    model = random_model(SMALL, std=0.1)
    ids = random_ids(SMALL, 1, length)[0].tolist()
    got = log_probabilities(Decoder(copy.deepcopy(model), torch.float32), ids)
    assert len(got) == length - 1
    for i in range(1, length):
        before = ids[:i] if i <= SMALL.block_size else ids[(i - 1) // 6 * 6 - 6 : i]
        expected = model(torch.tensor([before]))[0][0, -1].log_softmax(-1)[ids[i]]
        assert got[i - 1].item() == pytest.approx(expected.item(), abs=1e-4)

"""A residual network's float stream begins with the image turned to channels-last order, and its signs."""

import pytest
import torch

from phyla.quantized import functional as QF
from phyla.quantized.functional.stream import stream_op


@pytest.mark.parametrize("channels", [1, 15, 16, 33, 64, 130])
def test_a_stream_begins_with_the_image_turned_and_its_signs(channels: int) -> None:
    torch.manual_seed(0)
    for shape in ((2, channels, 5, 7), (1, channels, 16, 16), (3, channels, 1, 1), (0, channels, 4, 4), (2, channels, 0, 4)):
        x = torch.randn(shape)
        for image in (x, x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 0)[::2]):
            y, words = stream_op(image)
            assert torch.equal(y, x.permute(0, 2, 3, 1))
            assert y.is_contiguous()
            assert torch.equal(words, QF.pack(x.permute(0, 2, 3, 1)))
    torch.library.opcheck(stream_op.op, (torch.randn(2, channels, 5, 7),))

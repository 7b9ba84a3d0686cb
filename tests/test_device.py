"""Names of devices: what is not one is refused by name, before torch is asked."""

from __future__ import annotations

import pytest
import torch

from triptych.device import pick_device
from triptych.errors import DeviceError, InvalidRequest


@pytest.mark.parametrize("name", ["auto:5", "cpu:9", "cuda:²", "cuda:", "cuda:-1", "gpu", "", "cuda:99999"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^device: given .*; allowed: auto, cpu"):
        pick_device(name)


def test_what_is_not_here_is_told_with_what_is() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    kind = "xpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(DeviceError, match="this machine has: cpu"):
        pick_device(f"{kind}:0")

"""A request that contradicts itself: the field at fault is named, with what was given and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from triptych.errors import InvalidRequest
from triptych.request import Request


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"mask": Image.new("L", (8, 8))}, "mask", "given 'a mask'; allowed: none without images"),
        ({"aspect_ratio": "1:1", "width": 8}, "aspect_ratio", "given '1:1'; allowed: nothing beside width or height"),
        ({"aspect_ratio": "0:1"}, "aspect_ratio", "given '0:1'; allowed: two sides above 0"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt", "given '2 entries'; allowed: one, or 1 as for prompt"),
        ({"prompt": []}, "prompt", "given '0 prompts'; allowed: 1 to 64 prompts"),
        (
            {"sigmas": [1.0, 0.5], "num_inference_steps": 3},
            "sigmas",
            "given '2 sigmas'; allowed: 3, as many as num_inference_steps",
        ),
    ],
)
def test_fields_that_disagree(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Request.parse(**{"prompt": "a cat", **fields})
    assert (caught.value.field, caught.value.message) == (field, message)


def test_fields_that_agree() -> None:
    picture = Image.new("RGB", (8, 8))
    made = Request.parse(
        prompt=["a", "b"], negative_prompt=["c", "d"], images=[picture], mask=picture, sigmas=[1, 0.5],
        num_inference_steps=2, aspect_ratio="2:3",
    )  # fmt: skip
    assert made.ratio() == (2, 3) and made.prompts == ("a", "b")


def test_what_is_no_field_is_told_with_what_are() -> None:
    with pytest.raises(InvalidRequest, match=r"request: given 'colour'; allowed: .*width"):
        Request.parse(prompt="a cat", colour="red")

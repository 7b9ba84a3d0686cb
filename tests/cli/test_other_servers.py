"""The page for users of other servers: a row for each of their flags, and each thing of ours that it names exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from triptych.cli import app
from triptych.config import Layout

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-other-servers.md").read_text(encoding="utf-8")

CACHE_DIT = """
    --Bn --Bn-compute-blocks --Fn --Fn-compute-blocks --attn --cache --compile --compile-repeated-blocks --device
    --device-map --disable-fuse-lora --dtype --enable-cpu-offload --gen-device --generator-device --height --host
    --image-path --lora-name --lora-path --mask-policy --max-autotune --max-cached-steps
    --max-continuous-cached-steps --max-warmup-steps --mc --mcc --model-path --negative-prompt --num-inference-steps
    --parallel --parallel-text --parallel-text-encoder --parallel-type --parallel-vae --perf
    --pipeline-quant-config-path --port --prompt --quant-type --quantize --quantize-type --rdt --repeat
    --residual-diff-threshold --scm --steps --steps-mask --taylorseer --taylorseer-order --track-memory --uaa --uaqkv
    --ufp8 --ulysses-anything --ulysses-async --ulysses-float8 --w --warmup --warmup-interval --wi --width --workers
    --ws -order -q
"""
"""All that the parser of cache-dit 1.3.5's server takes."""

LIGHTX2V = """
    --config_json --host --lora_dir --max_queue_size --metric_port --model-variant --model_cls --model_path
    --nproc_per_node --port --task
"""
"""All that LightX2V's server has taken so far."""


def rows(title: str) -> list[list[str]]:
    """The cells of all tables of a part of the page."""
    part = PAGE.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]
    found = [re.split(r" \| ", line.strip("| ")) for line in part.splitlines() if line.startswith("| `")]
    assert all(len(cells) == 3 for cells in found), found
    return found


@pytest.mark.parametrize(("title", "flags"), [("cache-dit", CACHE_DIT), ("LightX2V", LIGHTX2V)])
def test_every_flag_of_theirs_has_a_row(title: str, flags: str) -> None:
    named = [name for cells in rows(title) for name in re.findall(r"`(-[\w-]+)`", cells[0])]
    assert sorted(named) == sorted(flags.split())


def test_what_the_page_names_of_ours_exists() -> None:
    serve: Any = typer.main.get_command(app)
    options = {name for parameter in serve.commands["serve"].params for name in parameter.opts}
    keys = set(keys_of(Layout))
    named = [cells[1] for title in ("cache-dit", "LightX2V") for cells in rows(title)]
    named += re.findall(r"`[a-z_]+(?:\[\])?(?:\.[a-z_]+)+`", PAGE)
    ours = [name for text in named for name in re.findall(r"`([^`]+)`", text)]
    assert ours
    for name in ours:
        word = name.split()[0]
        assert word in (options if word.startswith("-") else keys), name


def keys_of(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """Every key of a layout file as the page writes it: `limits.max_queue`, `workers[].stages`."""
    for name, info in section.model_fields.items():
        yield before + name
        kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                inside = f"{before}{name}[]." if name == "workers" else f"{before}{name}."
                yield from keys_of(kind, inside)

"""Layouts: what a file may say, one clear error for each thing that is wrong in it, flags over files."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from triptych.cluster import Limits
from triptych.config import (
    BoundsSection,
    ImageUrlsSection,
    Layout,
    LimitsSection,
    ListenSection,
    RatesSection,
    ServeSection,
    TransferSection,
    WorkerPlan,
    parse_cpus,
    parse_size,
    parse_stages,
)
from triptych.errors import InvalidRequest
from triptych.request import StageName
from triptych.transfer import TransferSettings

ROOT = Path(__file__).resolve().parents[1]
STAGES: tuple[StageName, ...] = ("encode", "denoise", "decode")
MIB = 2**20

WHOLE = """
name: two-denoisers
workers:
  - stages: [encode, decode]
    devices: cpu
    threads: 2
    cpus: [0, 1]
  - name: painter
    stages: transformer
    replicas: 2
    devices: [xpu:0]
    dtype: bfloat16
    capacity: 2
  - stages: denoise
    host: other
missing: wait
transfer: {host: 10.0.0.1, pool_bytes: 16 MiB, budget_bytes: 1GB, routes: [memfd, tcp], tls: true}
limits: {max_queue: 10, checkpoint_seconds: null, time_limit_seconds: 5}
listen: {endpoint: "tcp://0.0.0.0:7400", keys: keys}
serve: {host: 0.0.0.0, port: 0, max_body: 1MiB}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "layout.yaml"
        path.write_text(text)
        return path

    return write


def wrong(path: Path) -> list[str]:
    found = Layout.look(path)
    assert isinstance(found, list), found
    with pytest.raises(InvalidRequest) as caught:
        Layout.load(path)
    assert str(caught.value) == str(found[0])
    return [str(error) for error in found]


def test_a_file_says_what_runs_where(write: Any) -> None:
    layout = Layout.load(write(WHOLE))
    assert [(slot.name, slot.stages, slot.device, slot.host) for slot in layout.slots(STAGES)] == [
        ("encode-decode", ("encode", "decode"), "cpu", "local"),
        ("painter-0", ("denoise",), "xpu:0", "local"),
        ("painter-1", ("denoise",), "xpu:0", "local"),
        ("denoise", ("denoise",), "auto", "other"),
    ]
    both = layout.slots(STAGES)[0]
    assert (both.threads, both.cpus, both.dtype, both.capacity, both.local) == (2, (0, 1), None, None, True)
    painter = layout.slots(STAGES)[1]
    assert (painter.dtype, painter.capacity, painter.threads) == ("bfloat16", 2, None)
    given = {"pool_bytes": 16 * MIB, "budget_bytes": 10**9, "routes": ("memfd", "tcp"), "tls": True}
    assert layout.transfer.given() == {"host": "10.0.0.1", **given}
    assert layout.limits.given() == {"max_queue": 10, "checkpoint_seconds": None, "time_limit_seconds": 5.0}
    assert layout.listen == ListenSection(endpoint="tcp://0.0.0.0:7400", keys=Path("keys"))
    assert (layout.serve.host, layout.serve.port, layout.serve.max_body) == ("0.0.0.0", 0, MIB)
    layout.check(STAGES, 2**40)


def test_fused_and_split_fit_every_model() -> None:
    assert [slot.stages for slot in Layout.of("fused").slots(STAGES)] == [STAGES]
    assert [slot.name for slot in Layout.of("split").slots(STAGES)] == list(STAGES)
    for name in ("fused", "split"):
        assert [slot.stages for slot in Layout.of(name).slots(("denoise",))] == [("denoise",)]
        Layout.of(name).check(STAGES)
        Layout.of(name).check(("denoise",))
    layout = Layout.split()
    assert Layout.of(layout) is layout


def test_names_of_workers_are_unique(write: Any) -> None:
    layout = Layout.load(write("workers: [{stages: denoise, devices: xpu:0}, {stages: denoise, devices: xpu:1}]"))
    assert [(slot.name, slot.device) for slot in layout.slots(STAGES)] == [
        ("denoise-0", "xpu:0"),
        ("denoise-1", "xpu:1"),
    ]
    layout = Layout.load(write("workers: [{stages: all, name: a-1}, {stages: all, name: a, replicas: 2}]"))
    with pytest.raises(InvalidRequest, match="workers: given 'a-1'; allowed: names that differ"):
        layout.check(STAGES)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", ["workers: given 'nothing'; allowed: a value, it cannot be left out (layout.yaml, line 1)"]),
        ("workers: []", ["workers: given []; allowed: a list of at least 1 (layout.yaml, line 1)"]),
        ("- 1", ["layout: given [1]; allowed: keys with values"]),
        ("workers: [", ["layout: given 'layout.yaml'; allowed: YAML (line 1: "]),
        ("workers: !!python/name:os.system ''", ["layout: given 'layout.yaml'; allowed: YAML (line 1: "]),
        ("a: 1\na: 2", ["a: given 'the key twice'; allowed: once (layout.yaml, line 2)"]),
        ("1: 2", ["layout: given '1'; allowed: keys that are words (layout.yaml, line 1)"]),
        ("workers: &a [*a]", ["layout: given 'layout.yaml'; allowed: at most 20 levels"]),
        (
            "workers:\n  - stages: encode\n    thread: 2\n",
            ["workers[0]: given 'thread'; allowed: the keys name, stages, replicas, devices, threads, "],
        ),
        ("workers:\n  - threads: 2", ["workers[0].stages: given 'nothing'; allowed: a value"]),
        (
            "workers:\n  - stages: rewrite\n    replicas: 0\n"
            "  - stages: [all, encode]\n    cpus: [x]\n    capacity: true\n",
            [
                "workers[0].stages[0]: given 'rewrite'; allowed: 'encode', 'denoise', 'decode', 'all' or 'each' "
                "(layout.yaml, line 2)",
                "workers[0].replicas: given 0; allowed: greater than or equal to 1 (layout.yaml, line 3)",
                "workers[1].stages: given ['all', 'encode']; allowed: each stage once; `all` or `each` alone",
                "workers[1].cpus[0]: given 'x'; allowed: a valid integer (layout.yaml, line 5)",
                "workers[1].capacity: given True; allowed: a valid integer (layout.yaml, line 6)",
            ],
        ),
        (
            "workers: [{stages: all}]\ntransfer:\n  pool_bytes: many\n  routes: [pigeon]\n  tls: 1\n",
            [
                "transfer.pool_bytes: given 'many'; allowed: bytes, such as 268435456, 256MiB or 8GB",
                "transfer.routes[0]: given 'pigeon'; allowed: 'reference', 'memfd', 'tcp' or 'mooncake'",
                "transfer.tls: given 1; allowed: a valid boolean (layout.yaml, line 5)",
            ],
        ),
        (
            "workers: [{stages: all}]\nlimits: {lease: 3}\nlisten: {endpoint: 'http://a'}\nserve: {port: 70000}",
            [
                "limits: given 'lease'; allowed: the keys heartbeat_seconds, lease_seconds, ",
                "listen.endpoint: given 'http://a'; allowed: ",
                "listen.keys: given 'nothing'; allowed: ",
                "serve.port: given 70000; allowed: less than or equal to 65535",
            ],
        ),
        ("name: 2026-13-01\nworkers: [{stages: all}]", ["layout: given '2026-13-01'; allowed: a value (month must be"]),
        ("workers:\n- stages: all\n  threads: " + "9" * 5000, ["layout: given '9999"]),
        (
            f"workers: [{{stages: all}}]\ntransfer: {{pool_bytes: {'9' * 400}k}}",
            ["transfer.pool_bytes: given '9999"],
        ),
        ("workers: [{stages: all, cpus: [-1]}]", ["workers[0].cpus[0]: given -1; allowed: greater than or equal to 0"]),
        ("workers: [{stages: all, cpus: [1, 1]}]", ["workers[0].cpus: given [1, 1]; allowed: each processor once"]),
        ("workers: [{stages: all}]\nname: split", ["name: given 'split'; allowed: another name (layout.yaml, line 2)"]),
        ("worker: [{stages: all}]", ["layout: given 'worker'; allowed: the keys name, workers, ", "workers: "]),
    ],
)  # fmt: skip
def test_each_wrong_thing_is_one_line_with_its_place(write: Any, text: str, lines: list[str]) -> None:
    found = wrong(write(text))
    if text.startswith("worker:"):
        found.sort()
    assert len(found) == len(lines), found
    for message, line in zip(found, lines, strict=True):
        assert message.startswith(line) and "\n" not in message, message


def test_a_bomb_of_anchors_is_refused_at_once(write: Any) -> None:
    lines = ["a0: &a0 [1]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "values" in wrong(write("\n".join(lines)))[0]


def test_a_file_that_cannot_be_read(tmp_path: Path, short_path: Path, write: Any) -> None:
    for path in (short_path, short_path / "none.yaml"):
        assert wrong(path) == [f"layout: given {str(path)!r}; allowed: fused, split, or the path of a YAML file"]
    assert "at most 1048576 bytes" in wrong(write("#" * (MIB + 1)))[0]
    (tmp_path / "bytes.yaml").write_bytes(b"a: \x80\x01")
    assert wrong(tmp_path / "bytes.yaml")[0].startswith("layout: given 'bytes.yaml'; allowed: YAML (")


@pytest.mark.parametrize(
    ("text", "stages", "line"),
    [
        ("workers: [{stages: encode}]", ("denoise",), "workers[0].stages: given 'encode'; allowed: denoise, all, each"),
        (
            "workers: [{stages: [encode, decode]}]",
            STAGES,
            "workers: given 'decode, encode'; allowed: one for denoise too (or `missing: wait`",
        ),
        ("workers: [{stages: all, devices: [xpu:0, xpu:1]}]", STAGES, "workers[0].devices: given ['xpu:0', 'xpu:1']"),
        ("workers: [{stages: all, host: far}]", STAGES, "workers[0].host: given 'far'; allowed: local, as there is no"),
        (
            "workers: [{stages: each}]\ntransfer: {port: 7400}",
            STAGES,
            "transfer.port: given 7400; allowed: 0, as 3 workers and the coordinator on this host",
        ),
        (
            "workers: [{stages: all, host: far}]\nlisten: {endpoint: 'tcp://0.0.0.0:1', keys: k}",
            STAGES,
            "transfer.host: given '127.0.0.1'; allowed: an address of this host that far can reach",
        ),
    ],
)
def test_a_layout_is_checked_against_the_model(write: Any, text: str, stages: Any, line: str) -> None:
    layout = Layout.load(write(text))
    problems = layout.problems(stages)
    assert str(problems[0]).startswith(line), problems
    with pytest.raises(InvalidRequest):
        layout.check(stages)


def test_a_missing_stage_may_be_waited_for(write: Any) -> None:
    layout = Layout.load(write("workers: [{stages: encode}]\nmissing: wait"))
    layout.check(STAGES)
    assert layout.missing_stages(STAGES) == ("denoise", "decode")


def test_pools_larger_than_memory_are_refused(write: Any) -> None:
    layout = Layout.load(
        write("workers: [{stages: all, replicas: 3}]\ntransfer: {pool_bytes: 1GiB, budget_bytes: 9GiB}")
    )
    messages = [str(problem) for problem in layout.problems(STAGES, 4 * 2**30)]
    assert messages[0].startswith("transfer.pool_bytes: given 1073741824; allowed: at most 715827882, as 3 workers")
    assert messages[1].startswith("transfer.budget_bytes: given 9663676416; allowed: at most this host's memory")
    assert layout.problems(STAGES, 64 * 2**30) == []


def test_flags_go_over_the_file(write: Any) -> None:
    layout = Layout.load(write(WHOLE)).overridden(device="cpu", dtype="float32", threads=1, capacity=3, port=9000)
    assert {(slot.device, slot.dtype, slot.threads, slot.capacity) for slot in layout.slots(STAGES)} == {
        ("cpu", "float32", 1, 3)
    }
    assert (layout.serve.host, layout.serve.port) == ("0.0.0.0", 9000)
    assert layout.overridden() == layout
    moved = layout.overridden(listen="tcp://127.0.0.1:1")
    assert moved.listen == ListenSection(endpoint="tcp://127.0.0.1:1", keys=Path("keys"))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"dtype": "int3"}, "dtype: given 'int3'; allowed: 'float32', 'bfloat16' or 'float16'"),
        ({"threads": 0}, "threads: given 0; allowed: greater than or equal to 1"),
        ({"port": -1}, "port: given -1; allowed: greater than or equal to 0"),
        ({"listen": "tcp://a:1"}, "listen: given 'tcp://a:1'; allowed: an endpoint and a folder of keys, both"),
        ({"keys": Path("k")}, "listen: given 'k'; allowed: an endpoint and a folder of keys, both"),
        ({"listen": "a:1", "keys": Path("k")}, "listen: given 'a:1'; allowed: tcp://HOST:PORT, "),
    ],
)
def test_a_wrong_flag_is_one_line(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Layout.fused().overridden(**flags)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("text", "size"), [("1024", 1024), ("256MiB", 256 * MIB), ("8 GB", 8 * 10**9), ("1.5k", 1500), ("2g", 2 * 10**9)]
)
def test_sizes_are_written_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_stages_and_cpus_of_a_command_line() -> None:
    assert parse_stages("decoder,encode") == ("encode", "decode")
    assert parse_stages("transformer") == ("denoise",)
    assert parse_cpus("0,2-4") == (0, 2, 3, 4)
    for text in ("", "rewrite", "encode,encoder", "all"):
        with pytest.raises(InvalidRequest, match="stages: given"):
            parse_stages(text)
    for text in ("", "a", "3-1", "1,1", "-1"):
        with pytest.raises(InvalidRequest, match="cpus: given"):
            parse_cpus(text)


@pytest.mark.parametrize(("section", "settings"), [(TransferSection, TransferSettings), (LimitsSection, Limits)])
def test_a_section_has_the_fields_and_defaults_of_what_it_configures(
    section: type[BaseModel], settings: type[Any]
) -> None:
    wanted = {field.name: field.default for field in fields(settings)}
    assert {name: info.default for name, info in section.model_fields.items()} == wanted
    assert settings(**section().model_dump()) == settings()


def test_every_field_is_documented() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    sections = (Layout, WorkerPlan, TransferSection, LimitsSection, ListenSection, ServeSection)
    for section in (*sections, BoundsSection, RatesSection, ImageUrlsSection):
        rows = dict(re.findall(r"^\| `([a-z_]+)` \| ([^\n]*) \|$", section_of(page, section), re.MULTILINE))
        assert list(rows) == list(section.model_fields), section.__name__
        for name, text in documented(section).items():
            default, meaning = rows[name].split(" | ", 1)
            assert meaning == text, f"{section.__name__}.{name}"
            assert default == shown(section.model_fields[name]), f"{section.__name__}.{name}"


def section_of(page: str, section: type[BaseModel]) -> str:
    titles = {
        "Layout": "The file",
        "WorkerPlan": "`workers`",
        "BoundsSection": "`serve.bounds`",
        "RatesSection": "`serve.rates`",
        "ImageUrlsSection": "`serve.image_urls`",
    }
    title = titles.get(section.__name__, f"`{section.__name__.removesuffix('Section').lower()}`")
    return page.split(f"### {title}\n", 1)[1].split("\n###", 1)[0]


def documented(section: type[BaseModel]) -> dict[str, str]:
    """The sentence under each field of a section in its source."""
    return dict(re.findall(r'^    (\w+): [^\n]*\n    """([^"]*)"""', inspect.getsource(section), re.MULTILINE))


def shown(info: Any) -> str:
    """A default as the page shows it."""
    value = info.default
    if info.is_required():
        return "required"
    if isinstance(value, BaseModel):
        return "all defaults"
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    if isinstance(value, int | float):
        return f"`{value // MIB}MiB`" if value >= MIB else f"`{value:g}`"
    return f"`{', '.join(value) or '[]'}`" if isinstance(value, tuple) else f"`{value}`"


def test_the_config_room_is_free_of_torch() -> None:
    code = "import sys, triptych.config as c; c.Layout.split(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", timeout=60).returncode == 0


@pytest.mark.parametrize("page", ["layouts.md", "deploy.md"])
def test_the_documented_files_are_right(page: str, write: Any) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        Layout.load(write(block)).check(STAGES, 2**40)

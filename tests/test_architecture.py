"""The design's rules that a machine can check: arrows between rooms, torch-free rooms, names, sizes, bans."""

from __future__ import annotations

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import triptych

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "triptych"
MAX_FILE_LINES = 500
MAX_P90_FUNCTION_LINES = 30

BASE = {"request", "errors", "device", "noise"}
ARROWS: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"server", "check", "noise"},
    "check": {"engine"},
    "client": {"errors"},
    "server": {"engine"},
    "engine": {"cluster", "worker", "config"},
    "cluster": {"messages", "sockets", "stream"},
    "worker": {"encode", "denoise", "decode", "sockets", "stream"},
    "encode": {"stage"},
    "denoise": {"stage"},
    "decode": {"stage"},
    "stage": {"model", "transfer"},
    "model": BASE,
    "transfer": {"messages", "device"},
    "config": {"messages"},
    "messages": {"request"},
    "stream": {"line"},
    "line": set(),
    "sockets": set(),
    "device": {"errors"},
    "request": {"errors"},
    "noise": set(),
    "errors": set(),
}
"""Who may import whom; what a room may import, those above it may too. `triptych` itself only re-exports."""

TORCH_FREE = ("client", "errors", "request", "messages", "line", "sockets", "stream", "config", "cluster", "server")
"""Rooms none of whose modules may bring torch along."""

TORCH_FREE_DOORS = (
    "triptych",
    "model",
    "model.topology",
    "transfer",
    "transfer.settings",
    "worker",
    "worker.uplink",
    "cli",
    "engine",
)
"""Modules that may be imported without torch coming along, though their rooms use it."""

THROUGH_THE_WINDOW = {
    "triptych.model.topology": "plain data, imported where torch may not be",
}
"""Modules that other rooms may import by their own name instead of through their room's `__init__`."""

ENVIRONMENT: dict[str, str] = {
    "server/locks/keys.py": "API keys, which are secrets",
    "cluster/host/processes.py": "what a worker process is to see of it, with what its slot adds",
}
"""Files of src that may read the environment, with the reason."""

NAMES_CUDA: dict[str, str] = {
    "device.py": "the kinds of devices that `--device` takes",
    "cli/options.py": "the same, in the option's help",
}
"""Files of src that may say `cuda`, with the reason."""

PUBLIC_NAMES = {
    "AsyncClient", "AsyncRemoteJob", "Cancelled", "Client", "Clip", "DeviceError", "Engine", "InvalidRequest", "Job",
    "JobUpdate", "LoadError", "MediaError", "ModelNotFound", "NoWorker", "NotEnoughMemory", "Progress", "QueueFull",
    "RemoteFile", "RemoteJob", "RemoteResult", "Request", "Result", "StageFailed", "StageTime", "TriptychError",
    "Trust", "Unreachable", "Unsupported", "WrongPayload", "__version__",
}  # fmt: skip


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    """The dotted name of a module of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The folder or file directly under the package that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


@cache
def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@cache
def exported(module: str) -> frozenset[str]:
    """What a room's `__init__` lists in `__all__`; nothing for a plain module."""
    path = PACKAGE.parent.joinpath(*module.split("."), "__init__.py")
    for node in tree(path).body if path.exists() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def imports(path: Path) -> Iterator[str]:
    """The package's own modules that a file imports, wherever in the file it does."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "triptych")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            if module.split(".")[0] == "triptych":
                yield from (imported(module, alias.name) for alias in node.names)


def imported(module: str, name: str) -> str:
    """The module that `from module import name` reaches into: a room for what it exports, else its submodule."""
    inner = f"{module}.{name}"
    return inner if name not in exported(module) and is_module(inner) else module


@cache
def below(room: str) -> frozenset[str]:
    """Every room that the arrows reach from a room."""
    direct = ARROWS[room]
    return frozenset(direct).union(*(below(other) for other in direct))


def edges() -> Iterator[tuple[str, str]]:
    """(importing module, imported module) for every import that leaves its room."""
    for path in sources():
        module = name_of(path)
        for target in imports(path):
            if module != "triptych" and room_of(module) != room_of(target):
                yield module, target


def test_every_room_is_in_the_table() -> None:
    assert {room_of(name_of(path)) for path in sources()} - {"triptych"} <= set(ARROWS)


def test_arrows_go_one_way() -> None:
    # `triptych` as a target means a name it re-exports, which only the command line may take from there.
    wrong = [
        f"{module} -> {target}"
        for module, target in edges()
        if (room_of(module) != "cli" if target == "triptych" else room_of(target) not in below(room_of(module)))
    ]
    assert not wrong, wrong


def test_rooms_are_entered_through_their_door() -> None:
    wrong = [
        f"{module} -> {target}"
        for module, target in edges()
        if target.count(".") > 1 and target not in THROUGH_THE_WINDOW
    ]
    assert not wrong, wrong


def test_exceptions_are_used() -> None:
    imported = {target for _, target in edges()}
    assert set(THROUGH_THE_WINDOW) <= imported


def test_torch_free_rooms() -> None:
    rooms = [name_of(path) for path in sources() if room_of(name_of(path)) in TORCH_FREE]
    doors = [name if name == "triptych" else f"triptych.{name}" for name in TORCH_FREE_DOORS]
    assert {room_of(name) for name in rooms} == set(TORCH_FREE)
    assert all(is_module(name) for name in doors)
    code = (
        "import importlib, sys\n"
        f"for name in {[*doors, *rooms]!r}:\n"
        "    importlib.import_module(name)\n"
        "    for heavy in ('torch', 'diffusers', 'transformers'):\n"
        "        if heavy in sys.modules:\n"
        "            sys.exit(f'{name} imports {heavy}')\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_help_imports_no_torch() -> None:
    done = run_python("-X", "importtime", "-m", "triptych", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "generate" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "triptych.cli" in loaded
    assert loaded.isdisjoint({"torch", "diffusers", "transformers", "numpy"})


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=PACKAGE.parent, stdin=subprocess.DEVNULL, timeout=60
    )


def test_public_names_are_pinned() -> None:
    assert set(triptych.__all__) == PUBLIC_NAMES
    assert sorted(triptych.__all__) == list(triptych.__all__), "kept in order"


@pytest.mark.parametrize("module", [name_of(path) for path in sources() if path.name == "__init__.py"])
def test_exported_names_exist(module: str) -> None:
    room = importlib.import_module(module)
    exported = getattr(room, "__all__", None)
    assert exported is not None, f"{module} has no __all__"
    missing = [name for name in exported if not hasattr(room, name)]
    assert not missing, missing


def strings(path: Path) -> Iterator[ast.Constant]:
    """The string constants of a file that are not docstrings."""
    bare = {id(node.value) for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node


def where(path: Path, node: ast.expr | ast.stmt) -> str:
    return f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno}"


def test_no_pickle() -> None:
    wrong = []
    for path in sources():
        for node in ast.walk(tree(path)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in modules} & {
                "pickle",
                "cloudpickle",
                "dill",
                "marshal",
                "shelve",
            }:
                wrong.append(where(path, node))  # pyright: ignore[reportArgumentType]
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
                wrong.append(where(path, node))
    assert not wrong, wrong


def test_environment_is_not_configuration() -> None:
    readers = {"os.environ", "os.getenv", "os.putenv", "environ", "getenv"}
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in readers
    }
    assert found == set(ENVIRONMENT)


def test_cuda_is_said_only_where_it_is_meant() -> None:
    found = set()
    for path in sources():
        named = any(re.search(r"\bcuda\b", str(node.value)) for node in strings(path))
        used = any(isinstance(node, ast.Attribute) and node.attr == "cuda" for node in ast.walk(tree(path)))
        if named or used:
            found.add(path.relative_to(PACKAGE).as_posix())
    assert found == set(NAMES_CUDA)


def test_no_global_state() -> None:
    wrong = [where(path, node) for path in sources() for node in ast.walk(tree(path)) if isinstance(node, ast.Global)]
    assert not wrong, wrong


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert not {name: lines for name, lines in lengths.items() if lines >= MAX_FILE_LINES}


def code_lines(path: Path) -> set[int]:
    """The numbers of the lines that hold code: no blanks, comments or docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def test_functions_are_short() -> None:
    lengths = []
    for path in sources():
        code = code_lines(path)
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append(len(code & set(range(node.lineno, (node.end_lineno or node.lineno) + 1))))
    lengths.sort()
    assert lengths[int(0.9 * len(lengths))] < MAX_P90_FUNCTION_LINES


def test_nothing_names_a_path_outside_the_repository() -> None:
    folders = "work|home|root|Users|mnt|opt|data|srv|tmp|farm|workspace"
    outside = re.compile(rf"(?<![\w.:/~*)>])/(?:{folders})/|\.\./" + "shared|file:" + "//")
    texts = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "constraints.txt", *ROOT.glob("*.md")]
    for folder in ("src", "tests", "docs", "benchmarks", "training", "scripts", ".ci"):
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in {"", ".py", ".md", ".json", ".yaml"}]
    wrong = []
    for path in texts:
        if path.is_file() and path != Path(__file__) and ROOT / "training" / "work" not in path.parents:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if outside.search(line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)

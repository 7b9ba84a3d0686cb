"""Runs what the documents tell a reader to run, and follows their links.

A command is a line of a ```sh block that begins with `$ `; the lines under it are its output, of which each must
appear (`…` stands for anything). ```sh exit=2 names the exit code. Variables last to the end of a document. A command
that ends in `&` runs in the background: the document goes on once it has printed the lines under it, and ends it with
`kill %1` (`%2` for the second one, and so on), after which it must have said the lines under that, too, and left with
code 0. ```yaml NAME and ```python NAME are files of that name. Other Python blocks of a document run as one script.

Commands find `photo.png`, `mask.png` and tiny stand-ins of the models they name in their folder; the ports and hosts
that documents name stand for free ones of this machine. A command that prints a traceback, or what a library says for
itself, fails.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

LONGEST = {"deploy.md", "generate.md", "models.md", "python.md"}
"""Run by `make verify`: up to a minute each."""

EXCEPTIONS = {
    "make demo": "sets up an environment of its own; .ci/run and a fresh clone prove it",
    "make test": "would run this test again",
}
"""Documented commands that are not run here, three at most, with the reason; the test summary prints them."""

STAND_INS = {"FLUX.1-schnell": "flux", "Qwen-Image": "qwen-image", "Wan2.1-T2V-1.3B-Diffusers": "wan-t2v"}
"""Folders that the documents name, and the tiny family that stands in for each."""

PORTS = ("8000", "7400")
HOSTS = ("10.0.0.1", "10.0.0.2")

READY_SECONDS = 180
BLOCK = re.compile(r"^```(\w*) *([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOISE = re.compile(r"^\[transformers\].*|^Traceback \(most recent call last\)|\S*Warning: .*", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@dataclass
class Command:
    """A documented command line with the exit code and the output lines that the document shows."""

    text: str
    code: int
    output: list[str] = field(default_factory=list)


def commands(document: Path) -> list[Command]:
    """The commands of a document, in order. Fails for a shell block that holds none."""
    found: list[Command] = []
    for language, info, body in BLOCK.findall(document.read_text(encoding="utf-8")):
        assert language not in {"bash", "shell", "console"}, f"{document.name}: use ```sh, so that it is run"
        if language != "sh":
            continue
        assert body.startswith("$ "), f"{document.name}: a sh block without a command: {body[:60]!r}"
        expected = re.search(r"exit=(\d+)", info)
        for line in body.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append(Command(" ".join(line[2:].split()), int(expected[1]) if expected else 0))
            elif line.strip():
                found[-1].output.append(line.strip())
    return found


def python_of(document: Path) -> str:
    """The Python blocks of a document, other than its files, as one script."""
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return "\n".join(body for language, info, body in found if language == "python" and not info)


@dataclass(frozen=True)
class Reader:
    """A reader's working folder and environment: `triptych` on the PATH, no hub, and what stands for the documents'
    ports and hosts."""

    here: Path
    environment: dict[str, str]
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    def translated(self, text: str) -> str:
        """A document's text with this machine's ports and hosts."""
        for documented, here in self.stand_ins.items():
            text = re.sub(rf"(?<![\w.]){re.escape(documented)}(?!\w)", here, text)
        return text

    def shell(self, text: str) -> list[str]:
        """Runs a command line with the variables that those before it have left, and keeps its own."""
        variables = self.here.parent / "variables"
        return [
            "bash",
            "-euo",
            "pipefail",
            "-c",
            f'set -a; . "{variables}"; trap \'export -p > "{variables}"\' EXIT\n{text}',
        ]


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    # Not at the top: the test summary imports this module, and is no reason to pay for diffusers.
    from tests.families import folder

    here, bin_folder = tmp_path / "here", tmp_path / "bin"
    here.mkdir()
    bin_folder.mkdir()
    (tmp_path / "variables").touch()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(here / "photo.png")
    Image.linear_gradient("L").resize((64, 64)).point([0] * 128 + [255] * 128).save(here / "mask.png")
    for name, family in STAND_INS.items():
        (here / name).symlink_to(folder(family), target_is_directory=True)
    for name, module in (("triptych", "-m triptych"), ("python", "")):
        shim = bin_folder / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        shim.chmod(0o755)
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment["PYTHONPATH"] = str(ROOT / "src")
    environment["HF_HUB_OFFLINE"] = "1"
    environment["COLUMNS"] = "110"
    return Reader(
        here, environment, {**dict(zip(PORTS, free_ports(), strict=True)), **dict.fromkeys(HOSTS, "127.0.0.1")}
    )


def free_ports() -> list[str]:
    """As many as the documents name."""
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        return [str(one.getsockname()[1]) for one in bound]


class Background:
    """A command that a document leaves running, and what it has printed."""

    def __init__(self, text: str, reader: Reader, log: Path) -> None:
        self.text, self._log = text, log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", "-c", f"exec {text}"], cwd=reader.here, env=reader.environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, output: list[str]) -> None:
        """Until it has printed these lines."""
        end = time.monotonic() + READY_SECONDS
        running = True
        while running:
            running = self.process.poll() is None and time.monotonic() < end  # before it is read: it may end in between
            unsaid = [line for line in output if not is_said(line, self.said())]
            if not unsaid:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.text} does not print {unsaid[0]!r} but:\n{self.said()[-3000:]}")

    def end(self, output: list[str]) -> None:
        """Ends it, as a reader would; its last lines are `output`."""
        self.process.send_signal(signal.SIGTERM)
        check(f"{self.text}, ended,", self.process.wait(READY_SECONDS), self.said(), Command(self.text, 0, output))

    def kill(self) -> None:
        """Leaves nothing behind, whatever it is at."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(60)


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=[pytest.mark.slow] if path.name in LONGEST else [], id=path.name) for path in DOCUMENTS],
)
def test_documented_commands(document: Path, reader: Reader) -> None:
    for name, text in files_of(document):
        (reader.here / name).write_text(reader.translated(text), encoding="utf-8")
    run_all([translated(command, reader) for command in commands(document) if command.text not in EXCEPTIONS], reader)
    script = python_of(document)
    if script:
        expect([sys.executable, "-c", script], Command("the Python blocks", 0), reader.here, reader.environment)


def translated(command: Command, reader: Reader) -> Command:
    return replace(command, text=reader.translated(command.text), output=[reader.translated(x) for x in command.output])


def files_of(document: Path) -> Iterator[tuple[str, str]]:
    """The files that a document shows with their names."""
    for language, info, body in BLOCK.findall(document.read_text(encoding="utf-8")):
        if language in ("yaml", "python") and info:
            yield info, body


def run_all(documented: list[Command], reader: Reader) -> None:
    """Runs a document's commands in order; whatever it began in the background it must have ended."""
    jobs: list[Background] = []
    with ExitStack() as stack:
        for command in documented:
            if command.text.endswith("&"):
                log = reader.here.parent / f"{len(jobs)}.log"
                jobs.append(Background(command.text.removesuffix("&").strip(), reader, log))
                stack.callback(jobs[-1].kill)
                jobs[-1].wait_for(command.output)
            elif match := re.fullmatch(r"kill %(\d+)", command.text):
                jobs[int(match[1]) - 1].end(command.output)
            else:
                expect(reader.shell(command.text), command, reader.here, reader.environment)
        left = [job.text for job in jobs if job.process.poll() is None]
        assert not left, f"never ended: {left}"


def expect(run: list[str], command: Command, here: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        run, cwd=here, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    check(command.text, done.returncode, done.stdout + done.stderr, command)


def check(who: str, code: int, said: str, command: Command) -> None:
    """Whether a command ended and spoke as its document says."""
    assert code == command.code, f"{who} ended with {code}:\n{said[-3000:]}"
    noise = NOISE.search(said)
    assert noise is None, f"{who} prints {noise[0]!r}:\n{said[-3000:]}"
    for line in command.output:
        assert is_said(line, said), f"{who} does not print {line!r} but:\n{said[-3000:]}"


def is_said(line: str, said: str) -> bool:
    """Whether a documented line is among what was printed."""
    parts = [re.escape(" ".join(part.split())) for part in line.split("…")]
    return re.search(".*?".join(parts), " ".join(said.split())) is not None


@pytest.mark.parametrize(
    "line",
    [
        "[transformers] `CLIPImageProcessor` requires torchvision",
        "Traceback (most recent call last):",
        "/lib/a.py:3: FutureWarning: soon gone",
    ],
)
def test_a_library_that_speaks_for_itself_fails(line: str, tmp_path: Path) -> None:
    say = [sys.executable, "-c", f"import sys; print('a.png'); print({line!r}, file=sys.stderr)"]
    with pytest.raises(AssertionError, match="prints"):
        expect(say, Command("triptych", 0, ["a.png"]), tmp_path, dict(os.environ))


@pytest.fixture
def bare(tmp_path: Path) -> Reader:
    """A reader without Triptych."""
    (tmp_path / "here").mkdir()
    (tmp_path / "variables").touch()
    return Reader(tmp_path / "here", dict(os.environ), {"8000": "8123"})


SERVER = "python3 -c 'import signal; print(\"up\", flush=True); signal.pause()'"
GENTLE = SERVER.replace("signal;", 'signal; signal.signal(15, lambda *_: exit(print("bye")));')


def test_a_background_command_is_waited_for_and_ended(bare: Reader) -> None:
    run_all([Command(f"{GENTLE} &", 0, ["up"]), Command("echo between", 0), Command("kill %1", 0, ["bye"])], bare)


@pytest.mark.parametrize(
    ("documented", "message"),
    [
        ([Command(f"{GENTLE} &", 0, ["up"])], "never ended"),
        ([Command(f"{GENTLE} &", 0, ["up"]), Command("kill %1", 0, ["see you"])], "does not print 'see you'"),
        ([Command(f"{SERVER} &", 0, ["up"]), Command("kill %1", 0)], "ended with -15"),
        ([Command("echo down &", 0, ["up"])], "does not print 'up'"),
    ],
)
def test_a_background_command_that_does_not_keep_its_word_fails(
    documented: list[Command], message: str, bare: Reader
) -> None:
    with pytest.raises(AssertionError, match=message):
        run_all(documented, bare)


def test_variables_last_and_ports_are_translated(bare: Reader) -> None:
    line = translated(Command("echo $url/1", 0, ["http://localhost:8000/1"]), bare)
    assert line.output == ["http://localhost:8123/1"]
    run_all([translated(Command("url=http://localhost:8000", 0), bare), line], bare)
    with pytest.raises(AssertionError, match="ended with 1"):
        run_all([Command("echo $unset", 0)], bare)


def test_exceptions_are_few_and_needed() -> None:
    documented = {command.text for document in DOCUMENTS for command in commands(document)}
    assert len(EXCEPTIONS) <= 3
    assert set(EXCEPTIONS) <= documented


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing, missing


def test_documented_targets_exist() -> None:
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    named = {name for text in texts for name in re.findall(r"(?:`|^\$ )make ([a-z]+)", text, re.MULTILINE)}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= targets, named - targets

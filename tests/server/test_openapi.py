"""The OpenAPI page: every route explained with examples that are true, and nothing answered that it does not say."""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import jsonschema_rs
import numpy as np
import pytest
import safetensors.numpy
import schemathesis
from fastapi import FastAPI
from hypothesis import strategies as st
from PIL import Image
from schemathesis.engine import events, from_schema

from tests.server.fake import TOPOLOGY, FakeEngine, File, Hand, Taken
from triptych.cluster.flushing import FlushReport, WorkerFlush
from triptych.config import ServeSection
from triptych.messages import MEDIA_TYPES
from triptych.model import VaeCall
from triptych.request import Request
from triptych.server import create_app
from triptych.server.locks.keys import ApiKey, KeyRing

KEY = "a-key-for-tests"
CLIPS = "(/v1/videos|/v1/tasks/video)"
"""Routes that need a model that makes clips."""
UNREACHED = {"POST /v1/vae/decode", "POST /v1/vae/encode", "GET /v1/files/{file}", "DELETE /v1/files/{file}"}
"""Where nothing drawn is taken: bytes that are the tensor which the query announces, ids of uploads."""
METHODS = ("get", "put", "post", "delete", "patch")


def _picture() -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (64, 64)).save(made, "PNG")
    return made.getvalue()


PICTURE = _picture()
TENSOR = safetensors.numpy.save({"tensor": np.zeros((1, 4, 8, 8), np.float32)})


class Quick(FakeEngine):
    """Every job is done as soon as it was taken."""

    def submit(self, request: Request, **options: Any) -> Taken:
        taken = super().submit(request, **options)
        kind = "video/mp4" if self.topology.makes == "video" else f"image/{request.output_format or 'png'}"
        self.files[taken.id] = [File(data=PICTURE, media_type=kind)] * (len(request.prompts) * request.num_outputs)
        self.put(taken.id, "done", started=time.time(), ended=time.time())
        return taken

    def submit_vae(self, call: VaeCall, data: bytearray, **options: Any) -> str:
        kind = options["encoding"].format
        tensor = kind == "safetensors"
        self.vae_made = File(data=TENSOR if tensor else PICTURE, media_type=MEDIA_TYPES[kind])
        return super().submit_vae(call, data, **options)


def application(makes: Literal["image", "video"] = "image") -> FastAPI:
    freed = WorkerFlush(worker="hand", stages={"denoise": {"previews": 204}}, process={"transfer": 0}, failed={})
    engine = Quick(
        topology=replace(TOPOLOGY, makes=makes, stages=tuple(replace(one, loads=("vae",)) for one in TOPOLOGY.stages)),
        workers=(Hand(),),
        flushed=FlushReport(workers=(freed,)),
    )
    ring = KeyRing([ApiKey("tests", hashlib.sha256(KEY.encode()).digest(), admin=True)])
    return create_app(engine, ServeSection(max_body=100_000, hosts=("testserver",)), version="1", keys=ring)


DOCUMENT = application().openapi()

ACCEPTED = ["2xx", "3xx", "400", "401", "403", "404", "409", "422", "429"]
"""What may become of a well-formed request. It may yet be wrong: a picture that is none, a size that the model cannot
make, two fields that exclude each other. Such a refusal must name what it refuses (`names_what_it_refuses`)."""

CANCELLING = ["/v1/jobs/{job}", "/v1/jobs/{job}/results/{number}", "/v1/jobs/{job}/events"]
"""Where DELETE cancels, so that something is left to look at."""

KINDS = ["/v1/tasks/image/", "/v1/tasks/video/"]
"""Where DELETE asks for a task of that name, which there is none of."""


schemathesis.openapi.format("binary", st.sampled_from([PICTURE, b"none"]))


@schemathesis.serializer("tensor/binary", "image/png", "image/jpeg", "image/webp")
def as_it_is(context: Any, value: Any) -> bytes:
    """A file as a body."""
    return value if isinstance(value, bytes) else str(value).encode()


@schemathesis.check
def names_what_it_refuses(context: Any, response: schemathesis.Response, case: schemathesis.Case) -> None:
    """Whoever sent what the page allows is told which field of it was refused."""
    if response.status_code not in (400, 422) or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    declared = {parameter.name for parameter in case.operation.iter_parameters()}
    for body in case.operation.body:
        declared |= set(resolved(body.definition.get("schema", {})).get("properties", {}))
    names = declared | {"body", "image", "model"}  # what is not in a form has these names
    assert any(name in response.text for name in names), f"{response.text} names none of {sorted(names)}"


@pytest.mark.parametrize("makes", ["image", "video"])
@pytest.mark.parametrize("examples", [2, pytest.param(150, marks=pytest.mark.slow)])
def test_what_is_answered_is_what_the_page_says(makes: Literal["image", "video"], examples: int) -> None:
    """All of schemathesis' checks, on the page's examples, at the edges of its schemas, on what is drawn from them, and
    on what follows from what was answered."""
    config = {
        "seed": 1,
        "headers": {"Authorization": f"Bearer {KEY}"},
        "generation": {"max-examples": examples, "deterministic": True},
        "checks": {
            "positive_data_acceptance": {"expected-statuses": ACCEPTED},
            "negative_data_rejection": {"expected-statuses": ["4xx"]},  # 413 too: a thousand fields are a large body
        },
        # It would take numbers in our messages for bounds of the field beside them.
        "phases": {"fuzzing": {"error-feedback": {"enabled": False}}},
        "operations": [
            {"include-path": CANCELLING, "checks": {"use_after_free": {"enabled": False}}},
            {"include-path": KINDS, "checks": {"unsupported_method": {"enabled": False}}},
        ],
    }
    page = schemathesis.openapi.from_asgi(
        "/openapi.json", application(makes), config=schemathesis.Config.from_dict(config)
    )
    chosen = page.exclude(path_regex=f"^(?!{CLIPS})" if makes == "video" else CLIPS)
    failures, statuses = [], Counter[tuple[str, int]]()
    for event in from_schema(chosen).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if isinstance(event, events.ScenarioFinished):
            recorder = event.recorder
            for name, interaction in recorder.interactions.items():
                assert interaction.response is not None, "every request is answered"
                statuses[recorder.cases[name].value.operation.label, interaction.response.status_code] += 1
            checks = [check for found in recorder.checks.values() for check in found]
            wrong = [(check.name, check.failure_info) for check in checks if check.failure_info is not None]
            failures += [f"{name}: {info.failure}\n{info.code_sample[:2000]}" for name, info in wrong]
    assert not failures, "\n\n".join(failures)
    assert not [found for found in statuses if found[1] >= 500], statuses
    labels = {label for label in OPERATIONS if bool(re.search(CLIPS, label)) == (makes == "video")}
    unreached = {label for label in labels if not any(statuses[label, status] for status in (200, 202, 206))}
    assert unreached <= UNREACHED, unreached


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS:
            if method in item:
                yield f"{method.upper()} {path}", item[method]


OPERATIONS = dict(operations())


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPERATIONS[request.param]


def resolved(found: Any) -> Any:
    while "$ref" in found:
        target: Any = DOCUMENT
        for part in found["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        found = target
    return found


def examples(media: dict[str, Any]) -> list[Any]:
    """All examples of a body: its own, or those of its schema."""
    named = [one["value"] for one in media.get("examples", {}).values()]
    own = resolved(media.get("schema", {}))
    return [*named, *([media["example"]] if "example" in media else []), *own.get("examples", [])]


def test_every_operation_says_what_it_does(operation: dict[str, Any]) -> None:
    assert operation["summary"] and operation["description"] and operation["tags"]
    assert len({one["operationId"] for one in OPERATIONS.values()}) == len(OPERATIONS)


def test_every_parameter_is_explained(operation: dict[str, Any]) -> None:
    unexplained = [one["name"] for one in operation.get("parameters", []) if not one.get("description")]
    assert not unexplained


def test_every_body_has_an_example(operation: dict[str, Any]) -> None:
    answers = [resolved(answer) for status, answer in operation["responses"].items() if status.startswith("2")]
    assert answers and all(answer["description"] for answer in answers)
    bodies = [operation["requestBody"], *answers] if "requestBody" in operation else answers
    for body in bodies:
        for kind, media in body.get("content", {}).items():
            assert examples(media), kind


def test_every_example_is_what_its_schema_says(operation: dict[str, Any]) -> None:
    bodies = [operation.get("requestBody", {}), *(resolved(answer) for answer in operation["responses"].values())]
    for body in bodies:
        for kind, media in body.get("content", {}).items():
            if kind == "application/json" and "schema" in media:
                whole = {**media["schema"], "components": DOCUMENT["components"]}
                validator = jsonschema_rs.validator_for(whole)
                for example in examples(media):
                    told = [error.message for error in validator.iter_errors(example)]
                    assert not [text for text in told if text not in UNSHOWN], example


def nullable() -> Iterator[str]:
    for model in DOCUMENT["components"]["schemas"].values():
        for name, about in model.get("properties", {}).items():
            if {"type": "null"} in about.get("anyOf", []):
                yield name


UNSHOWN = {f'"{name}" is a required property' for name in nullable()}
"""The framework leaves nulls out of its page, in examples too."""


def test_every_refusal_is_described(operation: dict[str, Any]) -> None:
    refusals = {status: resolved(answer) for status, answer in operation["responses"].items() if status > "399"}
    for status, answer in refusals.items():
        assert answer["description"] and ("content" in answer or status == "416"), status

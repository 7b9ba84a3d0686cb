"""The HTTP door's part of a layout file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from triptych.config.sections import MIB, Seconds, Section, Size, Switch, Whole
from triptych.config.words import one_or_many

__all__ = ["BoundsSection", "ImageUrlsSection", "RatesSection", "ServeSection"]

_NAME = r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*"
Host = Annotated[str, Field(pattern=rf"^(\*|{_NAME}|[0-9a-fA-F.]*(:[0-9a-fA-F.]*){{2,8}})$")]
Hosts = Annotated[tuple[Host, ...], BeforeValidator(one_or_many)]
Origin = Annotated[
    str, Field(pattern=rf"^(\*|https?://({_NAME}|\[[0-9a-fA-F.]*(:[0-9a-fA-F.]*){{2,8}}\])(:\d{{1,5}})?)$")
]
Origins = Annotated[tuple[Origin, ...], BeforeValidator(one_or_many)]
Source = Annotated[str, Field(pattern=rf"^(\*|(\*\.)?{_NAME})(:\d{{1,5}})?$")]
Sources = Annotated[tuple[Source, ...], BeforeValidator(one_or_many)]


class BoundsSection(Section):
    """What a request may ask for at most, whatever the model could do; null: no bound but the model's own."""

    width: Whole | None = Field(default=None, ge=1)
    """pixels of a picture's width"""
    height: Whole | None = Field(default=None, ge=1)
    """pixels of a picture's height"""
    pixels: Whole | None = Field(default=None, ge=1)
    """width × height"""
    frames: Whole | None = Field(default=None, ge=1)
    """frames of a clip"""
    steps: Whole | None = Field(default=None, ge=1)
    """denoising steps"""
    outputs: Whole = Field(default=16, ge=1)
    """pictures or clips of one request, prompts × num_outputs"""
    images: Whole = Field(default=16, ge=0)
    """pictures that a request brings"""


class RatesSection(Section):
    """What one API key may ask for, or all together where there are no keys; null: no bound."""

    jobs_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """new jobs, a minute's worth of them at once"""
    jobs_at_once: Whole | None = Field(default=None, ge=1)
    """jobs that have not ended"""


class ImageUrlsSection(Section):
    """Pictures that a request names by URL, which the server then fetches."""

    allow: Sources = ()
    """hosts to fetch from: `cdn.example.org`, `cdn.example.org:8443`, `*.example.org`, `*` (all public); none: off"""
    seconds: Seconds = 10.0
    """that a picture may take in all"""
    max_bytes: Size = Field(default=32 * MIB, ge=1)
    """of one picture"""
    max_redirects: Whole = Field(default=3, ge=0, le=10)
    """each of which is checked like the URL itself"""


class ServeSection(Section):
    """The HTTP door."""

    host: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    """address to answer on"""
    port: Whole = Field(default=8000, ge=0, le=65535)
    """the port to answer on; 0: any free one"""
    max_body: Size = Field(default=64 * MIB, ge=1)
    """bytes of a request's body"""
    max_bodies: Size = Field(default=512 * MIB, ge=1)
    """bytes of all requests' bodies at a time, at least `max_body`; more are answered with 429"""
    max_connections: Whole = Field(default=1024, ge=1)
    """requests that are answered at a time; more are refused with 503"""
    api_keys: Path | None = None
    """file with the API keys, made by `triptych keys api`; null: whoever reaches the server may use it"""
    api_keys_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
    """name of an environment variable that holds API keys, instead of a file"""
    insecure: Switch = False
    """allows a public address without API keys"""
    hosts: Hosts = ()
    """names that clients may call the server by, beside its own address; `*`: any"""
    origins: Origins = ()
    """web pages that may use the server, as `https://app.example.org`; none: no web page elsewhere"""
    bounds: BoundsSection = BoundsSection()
    """what a request may ask for"""
    rates: RatesSection = RatesSection()
    """what one API key may ask for"""
    image_urls: ImageUrlsSection = ImageUrlsSection()
    """pictures by URL"""
    output_folder: Path | None = None
    """folder below which cache-dit's `output_format: path` writes; null: that is refused"""
    artifacts: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9+.-]*://\S+$")
    """fsspec URL where results and checkpoints lie, as `s3://bucket/triptych`; null: in the state folder"""
    settings_in_files: Switch = False
    """writes a request's settings, prompt and all, into the pictures and clips that it makes"""
    log_format: Literal["text", "json"] = "text"
    """of the server's log"""
    log_prompts: Switch = False
    """prompts in the log"""
    otlp: str | None = Field(default=None, pattern=r"^https?://\S+$")
    """URL of an OpenTelemetry collector that traces are sent to; needs the extra `otel`"""

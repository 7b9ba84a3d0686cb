"""What people write first: a FastAPI application around a pipeline, with a lock.

`python -m benchmarks.locked_diffusers FOLDER PORT` takes cache-dit's `POST /generate` as far as text to image goes.
"""

from __future__ import annotations

import base64
import io
import sys
import threading
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel

__all__ = ["create_app"]


class Wanted(BaseModel):
    """A picture."""

    prompt: str
    width: int
    height: int
    num_inference_steps: int
    seed: int
    guidance_scale: float = 1.0


def create_app(pipe: Any) -> FastAPI:
    """The application; its routes run on threads, one at a time in the pipeline."""
    app = FastAPI()
    lock = threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/generate")
    def generate(wanted: Wanted) -> dict[str, list[str]]:
        generator = torch.Generator("cpu").manual_seed(wanted.seed)
        with lock:
            made = pipe(
                prompt=wanted.prompt, width=wanted.width, height=wanted.height, generator=generator,
                num_inference_steps=wanted.num_inference_steps, guidance_scale=wanted.guidance_scale,
            )  # fmt: skip
        buffer = io.BytesIO()
        made.images[0].save(buffer, format="PNG")
        return {"images": [base64.b64encode(buffer.getvalue()).decode()]}

    return app


def main(folder: str, port: str) -> None:
    """Serves until it is told to stop."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    uvicorn.run(create_app(pipe), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])

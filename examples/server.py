"""One pipeline behind HTTP. Requests wait in a queue, one worker draws them, each has S-CFG settings of its own.

python examples/server.py --port 8000
curl "http://localhost:8000/?prompt=a+panda+on+a+beach&seed=3&rate_max=1.5" > panda.png

A pipeline serves one call at a time, so there is one worker for each pipeline, and a full queue answers 503.
"""

import argparse
import dataclasses
import io
import json
import queue
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import torch

import scfg_fast
from scfg_fast.models import bundled_pipeline

MAX_STEPS = 100
SETTINGS = {field.name for field in dataclasses.fields(scfg_fast.SCFGConfig)}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--waiting", type=int, default=16, help="requests that may wait")


class Worker:
    """Draws what is in its queue, in a thread of its own, until `close`."""

    def __init__(self, pipe: object, waiting: int) -> None:
        self.pipe = pipe
        self.handle = scfg_fast.enable(pipe)
        self.jobs: queue.Queue[tuple[dict, Future] | None] = queue.Queue(waiting)
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def submit(self, job: dict) -> Future:
        """The PNG of a job, later. Raises `queue.Full` if too many wait already."""
        future: Future = Future()
        self.jobs.put_nowait((job, future))
        return future

    def close(self) -> None:
        """Finish what waits, then make the pipeline stock again."""
        self.jobs.put(None)
        self.thread.join()
        self.handle.disable()

    def _work(self) -> None:
        while (entry := self.jobs.get()) is not None:
            job, future = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                image = self.pipe(**job).images[0]
                file = io.BytesIO()
                image.save(file, format="PNG")
                future.set_result(file.getvalue())
            except Exception as error:  # the next request must still be served
                future.set_exception(error)


def read_job(query: str) -> dict:
    """Arguments of the pipeline's call from a query string.

    Raises:
        ValueError: no prompt, an unknown name, or a value that cannot be used.
    """
    values = dict(parse_qsl(query, strict_parsing=True))
    seed, steps = int(values.pop("seed", 0)), int(values.pop("steps", 25))
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be from 1 to {MAX_STEPS}, got {steps}")
    job = {
        "prompt": values.pop("prompt", ""),
        "guidance_scale": float(values.pop("guidance_scale", 5.0)),
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
    }
    if not job["prompt"].strip():
        raise ValueError("there is no prompt; write ?prompt=...")
    if unknown := sorted(set(values) - SETTINGS):
        raise ValueError(
            f"{', '.join(unknown)} is unknown; use prompt, seed, steps, guidance_scale or a field of SCFGConfig"
        )
    settings = {name: json.loads(text) if text[:1] in "-0123456789tfn" else text for name, text in values.items()}
    scfg_fast.SCFGConfig(**settings)  # raises where a value cannot be used
    return job | {"scfg_kwargs": settings}


class Handler(BaseHTTPRequestHandler):
    worker: Worker

    def do_GET(self) -> None:
        try:
            picture = self.worker.submit(read_job(urlsplit(self.path).query)).result()
        except queue.Full:
            self._answer(503, b"too many requests wait; try again later\n")
        except (ValueError, TypeError) as error:
            self._answer(400, f"{error}\n".encode())
        except Exception as error:
            self._answer(500, f"{type(error).__name__}: {error}\n".encode())
        else:
            self._answer(200, picture, "image/png")

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def build_server(host: str, port: int, waiting: int) -> ThreadingHTTPServer:
    """A server that is not running yet; its `worker` must be closed after it."""
    pipe = bundled_pipeline()
    pipe.set_progress_bar_config(disable=True)
    worker = Worker(pipe, waiting)
    server = ThreadingHTTPServer((host, port), type("BoundHandler", (Handler,), {"worker": worker}))
    server.worker = worker
    return server


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    server = build_server(args.host, args.port, args.waiting)
    print(f"http://{args.host}:{server.server_port}/?prompt=a+panda+on+a+beach")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("finishing what waits")
    finally:
        server.server_close()
        server.worker.close()


if __name__ == "__main__":
    main()

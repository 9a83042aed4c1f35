"""The HTTP service under load: requests per second, quantiles of their latency, and whether every answer is right.

    python bench/serve.py
    python bench/serve.py --model runs/m2rec --minutes 10 --connections 16

Starts `fastm2rec serve` on a free port of this machine and asks it from here over keep-alive connections, each of
which waits for its answer before it asks again. Client and server share the machine, so the client's own work is in the
figures. Every answer is compared with what `Recommender.recommend` says to the same history, alone, in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # from a clone, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import _results
from fastm2rec import M2Rec, M2RecConfig, Recommender, Vocabulary

SERVER = (sys.executable, "-m", "fastm2rec.cli", "serve")
WARM_UP = 200  # requests that are not counted
ALONE = 500  # requests of the row with one connection
QUESTIONS = 400  # distinct histories that are asked again and again
RSS_SECONDS = 15.0  # between two looks at the server's memory
PATIENCE = 60.0  # seconds after which an answer counts as lost


@dataclass
class Question:
    """A request, and what the direct call answers."""

    request: bytes
    items: list[Any]
    scores: list[float]
    right: bytes | None = None  # an answer that has been parsed and found right


@dataclass
class Row:
    """A load and how the service bore it. Times are milliseconds, from sending a request to the end of its answer."""

    connections: int
    requests: int = 0
    seconds: float = 0.0
    requests_per_s: float = 0.0
    p50_ms: float = 0.0
    p90_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0
    errors: int = 0  # answers of another status than 200
    lost: int = 0  # requests without an answer
    wrong: int = 0  # answers whose items or scores are not those of the direct call
    max_score_difference: float = 0.0
    mean_batch: float = 0.0
    server_cpu_ms: float | None = None  # the server's processor time a request
    rss_start_mb: float | None = None
    rss_end_mb: float | None = None
    rss_mb: list[float] = field(default_factory=list)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a saved model (default: an untrained M2Rec of ML-1M's size, L=50)")
    add("--connections", type=_positive, default=16, help="clients at once (default: 16)")
    add("--requests", type=_positive, default=10_000, help="requests in all (default: 10,000)")
    add("--minutes", type=float, help="go on for so long instead of counting requests")
    add("--topk", type=_positive, default=10, help="items out (default: 10)")
    add("--threads", type=_positive, default=1, help="threads that the server computes with (default: 1)")
    add("--max-batch", type=_positive, default=64, help="as of `fastm2rec serve` (default: 64)")
    add("--window-ms", type=float, default=2.0, help="as of `fastm2rec serve` (default: 2)")
    add("--out", metavar="FILE", help="write the JSON here (default: a temporary folder)")
    add("--record", action="store_true", help="write the JSON to bench/results")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def make_model(folder: Path, n_items: int = 3706, max_len: int = 50) -> None:
    """Save an untrained model: its answers are as costly and as exact as a trained one's."""
    torch.manual_seed(0)
    model = M2Rec(M2RecConfig(n_items=n_items, max_len=max_len, gate="none"))
    model.vocab = Vocabulary(range(1, n_items + 1), [f"Item number {item}" for item in range(1, n_items + 1)])
    model.save_pretrained(folder)


def make_questions(folder: Path, topk: int) -> list[Question]:
    """Random histories of 1 to 2 L items, and the answers of direct calls with one history each."""
    recommender = Recommender.from_pretrained(folder)
    chance = random.Random(0)
    items = range(1, recommender.n_items + 1) if recommender.vocab is None else recommender.vocab.items
    questions = []
    for _ in range(QUESTIONS):
        history = chance.choices(items, k=chance.randint(1, 2 * recommender.max_len))
        (answer,) = recommender.recommend([history], topk)
        body = json.dumps({"history": history, "k": topk}).encode()
        head = f"POST /recommend HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        questions.append(Question(head + body, [item for item, _ in answer.items], [s for _, s in answer.items]))
    return questions


@contextlib.contextmanager
def server(folder: Path, options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """A running service: its port and its process id. It must end with exit code 0 when it is asked to."""
    command = [*SERVER, "--model", str(folder), "--port", "0", "--threads", str(options.threads)]
    command += ["--max-batch", str(options.max_batch), "--window-ms", str(options.window_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_results.ROOT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the service did not start: exit code {process.wait()}")
        print(f"  {line.strip()}", file=sys.stderr)
        yield int(line.split()[0].rpartition(":")[2]), process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(PATIENCE) != 0:
            raise SystemExit(f"the service ended with exit code {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Connection:
    """A keep-alive connection; no more of HTTP than this client needs, so that the client is not what is measured."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer.

        Raises:
            OSError, EOFError, TimeoutError: there was none.
        """
        async with asyncio.timeout(PATIENCE):
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
            reader, writer = self._streams
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return int(head.split(None, 2)[1]), await reader.readexactly(size)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def load(
    port: int, pid: int, questions: list[Question], connections: int, requests: int, minutes: float | None = None
) -> Row:
    """Ask from `connections` connections until `requests` requests were made, or for `minutes`."""
    row = Row(connections, rss_start_mb=_rss_mb(pid))
    seconds: list[float] = []
    sums, cpu = await _batches(port), _cpu_seconds(pid)
    start = time.perf_counter()
    end = None if minutes is None else start + 60 * minutes
    chance = random.Random(1)

    async def client() -> None:
        connection = Connection(port)
        while (row.requests < requests) if end is None else (time.perf_counter() < end):
            row.requests += 1
            question = chance.choice(questions)
            begin = time.perf_counter()
            try:
                status, body = await connection.ask(question.request)
            except (OSError, EOFError, TimeoutError):
                row.lost += 1
                connection.close()
                continue
            seconds.append(time.perf_counter() - begin)
            if status != 200:
                row.errors += 1
            elif body != question.right:
                _compare(question, body, row)
        connection.close()

    async def watch() -> None:
        while True:
            await asyncio.sleep(RSS_SECONDS)
            now = _rss_mb(pid)
            if now is not None:
                row.rss_mb.append(now)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client() for _ in range(connections)))
    watcher.cancel()
    row.seconds = time.perf_counter() - start
    row.rss_end_mb = _rss_mb(pid)
    cpu_end = _cpu_seconds(pid)
    if cpu is not None and cpu_end is not None:
        row.server_cpu_ms = (cpu_end - cpu) / row.requests * 1e3
    row.requests_per_s = len(seconds) / row.seconds
    quantiles = torch.tensor([0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
    times = torch.tensor(seconds or [float("nan")], dtype=torch.float64) * 1e3
    row.p50_ms, row.p90_ms, row.p99_ms, row.max_ms = _quantiles(times, quantiles)
    total, count = (now - before for now, before in zip(await _batches(port), sums, strict=True))
    row.mean_batch = total / count if count else 0.0
    return row


def _quantiles(values: torch.Tensor, at: torch.Tensor) -> list[float]:
    """By rank: torch.quantile takes 16 million values at most, and a soak may have more."""
    ranks = (at * len(values)).ceil().long().clamp(1, len(values)) - 1
    return values.sort().values[ranks].tolist()


def _compare(question: Question, body: bytes, row: Row) -> None:
    (result,) = json.loads(body)["results"]
    items = [entry["item"] for entry in result["items"]]
    scores = [entry["score"] for entry in result["items"]]
    if items == question.items and scores == question.scores:
        question.right = body
        return
    row.wrong += 1
    if items == question.items:
        worst = max(abs(one - other) for one, other in zip(scores, question.scores, strict=True))
        row.max_score_difference = max(row.max_score_difference, worst)


async def _batches(port: int) -> tuple[float, float]:
    """How many histories the model has had so far, and in how many calls."""
    connection = Connection(port)
    _, body = await connection.ask(b"GET /metrics HTTP/1.1\r\nHost: bench\r\n\r\n")
    connection.close()
    values = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#"))
    return float(values["fastm2rec_batch_size_sum"]), float(values["fastm2rec_batch_size_count"])


def _rss_mb(pid: int) -> float | None:
    """Resident memory in units of 2^20 bytes, where /proc tells it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _cpu_seconds(pid: int) -> float | None:
    """Processor time of all threads so far, where /proc tells it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    """One connection, then as many as were asked for."""
    questions = make_questions(folder, options.topk)
    with server(folder, options) as (port, pid):

        async def work() -> list[Row]:
            await load(port, pid, questions, options.connections, WARM_UP)
            alone = await load(port, pid, questions, 1, min(ALONE, options.requests))
            many = await load(port, pid, questions, options.connections, options.requests, options.minutes)
            return [alone, many]

        return asyncio.run(work())


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [
        ["connections", "requests", "req/s", "p50 ms", "p90 ms", "p99 ms", "max ms", "p99/p50", "batch",
         "CPU ms/req", "errors", "lost", "wrong", "RSS MB"]
    ]  # fmt: skip
    for row in rows:
        rss = "" if row.rss_start_mb is None else f"{row.rss_start_mb:.1f} -> {row.rss_end_mb:.1f}"
        cpu = "" if row.server_cpu_ms is None else f"{row.server_cpu_ms:.2f}"
        lines.append(
            [
                str(row.connections), f"{row.requests:,}", f"{row.requests_per_s:,.0f}", f"{row.p50_ms:.2f}",
                f"{row.p90_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.max_ms:.2f}", f"{row.p99_ms / row.p50_ms:.1f}",
                f"{row.mean_batch:.1f}", cpu, str(row.errors), str(row.lost), str(row.wrong), rss,
            ]
        )  # fmt: skip
    return "\n".join(_results.aligned(lines, left=()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if an answer was lost, an error, or wrong."""
    options = parse(arguments)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="fastm2rec-bench-") as temporary:
        folder = Path(temporary) if options.model is None else Path(options.model)
        if options.model is None:
            make_model(folder)
        rows = measure(folder, options)
    print(table(rows))
    print("Client and server shared the machine; times on a machine that does other work as well say little.")
    names = ("topk", "threads", "max_batch", "window_ms", "minutes")
    document = {
        "schema": _results.SCHEMA,
        "device": _results.device_name(device),
        "device_type": device.type,
        **_results.origin(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),  # with the client and the server, at the end
        "shared_machine": "client and server ran on the same machine",
        "model": options.model or "untrained m2rec, 3,706 items, L=50",
        **{name: getattr(options, name) for name in names},
        "rows": [asdict(row) for row in rows],
    }
    path = _results.result_path("serve", device, options.out, options.record)
    _results.write_json(path, document)
    print(f"rows: {path}")
    return int(any(row.errors or row.lost or row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""The HTTP service: statuses and messages for every kind of request, and a life from start to SIGTERM."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from bench import serve as bench_serve
from fastm2rec import M2Rec, M2RecConfig, Recommendation, Recommender, Vocabulary
from fastm2rec.serving import Settings, create_app
from fastm2rec.serving.catalogue import Catalogue

N_ITEMS = 20
TITLES = [f"Film {item}" for item in range(1, 18)] + ["Amélie", "<script>alert(1)</script>", "The Film Noir"]
BREAKS_THE_MODEL = 13


class Answer(NamedTuple):
    items: list[Recommendation]
    skipped: int
    fallback: bool


@dataclass
class StandIn:
    """Recommends the items that are nearest to the last one by number; remembers what it was asked."""

    vocab: Vocabulary | None
    n_items: int = N_ITEMS

    def __post_init__(self) -> None:
        self.calls: list[list[list[Any]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def recommend(self, histories: Sequence[Sequence[Any]], k: int = 10, **options: Any) -> list[Answer]:
        self.calls.append([list(history) for history in histories])
        assert self.gate.wait(60)
        if any(BREAKS_THE_MODEL in history for history in histories):
            raise ArithmeticError("the scores are NaN")
        return [self._answer(history, k, **options) for history in histories]

    def _answer(self, history: Sequence[Any], k: int, exclude_seen: bool, unknown: str, empty: str) -> Answer:
        known = [item for item in history if isinstance(item, int) and 1 <= item <= self.n_items]
        skipped = len(history) - len(known)
        assert unknown == "skip" or not skipped
        assert empty == "popular" or known
        last = known[-1] if known else 1
        ranked = sorted(range(1, self.n_items + 1), key=lambda item: (abs(item - last), item))
        left = [item for item in ranked if not (exclude_seen and item in known)]
        return Answer([Recommendation(item, -float(abs(item - last))) for item in left[:k]], skipped, not known)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    stand_in = StandIn(Vocabulary(range(1, N_ITEMS + 1), TITLES))
    yield stand_in
    stand_in.gate.set()


def with_client(app: Any, work: Callable[[Any], Awaitable[None]]) -> None:
    """Run `work` with a client of `app`, and shut the service down behind it."""

    async def everything() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await work(client)
        await app.state.batcher.close()

    asyncio.run(asyncio.wait_for(everything(), 60))


def ask(stand_in: StandIn, content: Any, **settings: Any) -> Any:
    """The answer to one POST /recommend."""
    answers = []

    async def work(client: Any) -> None:
        body = content if isinstance(content, bytes) or hasattr(content, "__aiter__") else json.dumps(content)
        answers.append(await client.post("/recommend", content=body))

    with_client(create_app(stand_in, Settings(**settings), "toy"), work)
    return answers[0]


def test_an_answer(stand_in: StandIn) -> None:
    answer = ask(stand_in, {"histories": [[5, 99, 18], [2]], "k": 2})
    assert answer.status_code == 200
    assert answer.json() == {
        "model": "toy",
        "results": [
            {
                "items": [
                    {"item": 17, "score": -1.0, "title": "Film 17"},
                    {"item": 19, "score": -1.0, "title": "<script>alert(1)</script>"},
                ],
                "skipped": 1,
                "fallback": False,
            },
            {
                "items": [
                    {"item": 1, "score": -1.0, "title": "Film 1"},
                    {"item": 3, "score": -1.0, "title": "Film 3"},
                ],
                "skipped": 0,
                "fallback": False,
            },
        ],
    }


def test_options_of_a_request(stand_in: StandIn) -> None:
    (result,) = ask(stand_in, {"history": [5], "k": 1, "exclude_seen": False}, titles=False).json()["results"]
    assert result["items"] == [{"item": 5, "score": 0.0}]
    (result,) = ask(stand_in, {"history": [5]}).json()["results"]
    assert len(result["items"]) == 10
    assert ask(stand_in, {"histories": []}).json() == {"model": "toy", "results": []}


def test_unknown_items_and_empty_histories_by_option(stand_in: StandIn) -> None:
    refused = ask(stand_in, {"history": [5, 99]}, unknown="error")
    assert (refused.status_code, "history: unknown item id 99 at position 1" in refused.json()["detail"]) == (422, True)
    for history, why in (([], "it is empty"), ([98, 99], "none of its 2 ids is in the catalogue")):
        refused = ask(stand_in, {"histories": [[1], history]})
        assert refused.status_code == 422
        assert refused.json()["detail"] == f"histories[1]: expected at least one known item, but {why}"
    assert stand_in.calls == [], "what is refused does not reach the model"
    popular = ask(stand_in, {"histories": [[], [99], [4]]}, empty="popular").json()["results"]
    assert [(row["fallback"], row["skipped"]) for row in popular] == [(True, 0), (True, 1), (False, 0)]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is not JSON: EOF while parsing"),
        (b'{"history": [1', 400, "the body is not JSON: EOF while parsing a list at line 1 column 14"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON: recursion limit exceeded"),
        (b'{"history": [' + b"9" * 5000 + b"]}", 400, "the body is not JSON: number out of range"),
        (b'{"history": ["\\ud800"]}', 400, "the body is not JSON"),
        ([1, 2], 422, "input should be an object"),
        ({}, 422, "expected either history or histories"),
        ({"history": [1], "histories": [[1]]}, 422, "expected either history or histories"),
        ({"history": 1}, 422, "history: input should be a valid array, got 1"),
        ({"history": [1, 2.5]}, 422, "history[1]: expected an item id, a whole number or a string, got 2.5"),
        ({"histories": [[1], [None]]}, 422, "histories[1][0]: expected an item id, a whole number or a string"),
        ({"histories": [[1], [True]]}, 422, "histories[1][0]: expected an item id"),
        (b'{"history": [NaN]}', 422, "history[0]: expected an item id"),
        ({"history": [1], "k": 0}, 422, "k: input should be greater than or equal to 1, got 0"),
        ({"history": [1], "k": N_ITEMS + 1}, 422, "k: expected 1 to 20, the catalogue's size, got 21"),
        ({"history": [1], "k": "3"}, 422, 'k: input should be a valid integer, got "3"'),
        ({"history": [1], "top": 3}, 422, "top: extra inputs are not permitted"),
        ({"history": [1], "x" * 5000: 3}, 422, "x" * 60 + ": extra inputs are not permitted"),
        ({"histories": [[1]] * 1025}, 422, "histories: expected at most 1024 in a request, got 1025"),
        ({"history": ["y" * 5000]}, 422, "history: expected at least one known item, but none of its 1 ids"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(stand_in: StandIn, body: Any, status: int, message: str) -> None:
    answer = ask(stand_in, body)
    assert answer.status_code == status
    assert answer.json()["detail"].lower().startswith(message.lower())
    assert len(answer.json()["detail"]) < 600
    assert stand_in.calls == []


def test_other_paths_and_methods(stand_in: StandIn) -> None:
    async def work(client: Any) -> None:
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.get("/recommend")).status_code == 405
        answer = await client.get("/items", params={"limit": 0})
        assert (answer.status_code, answer.json()) == (
            422,
            {"detail": "limit: Input should be greater than or equal to 1"},
        )

    with_client(create_app(stand_in), work)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_beyond_the_limit(stand_in: StandIn, declared: bool) -> None:
    small = json.dumps({"history": [1]}).encode()

    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    for extra, status in ((0, 200), (1, 413)):
        body = small + b" " * extra
        answer = ask(stand_in, body if declared else pieces(body), max_body=len(small))
        assert answer.status_code == status
    assert answer.json() == {"detail": f"the body is longer than {len(small)} bytes"}
    assert answer.headers["connection"] == "close", "what is left of the body must not be read as a request"


def test_a_failing_model_is_an_error_of_that_batch_only(stand_in: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: Any) -> None:
        failed = await client.post("/recommend", json={"history": [BREAKS_THE_MODEL]})
        assert (failed.status_code, failed.json()["detail"]) == (
            500,
            "the model failed: ArithmeticError: the scores are NaN",
        )
        assert (await client.post("/recommend", json={"history": [1]})).status_code == 200
        assert (await client.get("/healthz")).status_code == 200

    with_client(create_app(stand_in), work)
    assert "ArithmeticError" in caplog.text, "the log has the traceback"


def test_a_full_queue_and_a_shutdown_answer_503(stand_in: StandIn) -> None:
    app = create_app(stand_in, Settings(queue=2))

    async def work(client: Any) -> None:
        stand_in.gate.clear()
        posts = [asyncio.ensure_future(client.post("/recommend", json={"history": [1]})) for _ in range(3)]
        while app.state.batcher.depth < 2:
            await asyncio.sleep(0.001)
        full = await client.post("/recommend", json={"history": [2]})
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        assert full.json()["detail"] == "2 of 2 places in the queue are taken; try again"
        assert "fastm2rec_queue_depth 2.0" in (await client.get("/metrics")).text
        assert (await client.get("/healthz/ready")).status_code == 200
        app.state.batcher.refuse()
        closed = await client.post("/recommend", json={"history": [2]})
        assert (closed.status_code, closed.headers["retry-after"]) == (503, "1")
        assert (await client.get("/healthz/ready")).status_code == 503
        assert (await client.get("/healthz/live")).status_code == 200
        stand_in.gate.set()
        assert [post.status_code for post in await asyncio.gather(*posts)] == [200, 200, 200]

    with_client(app, work)


@pytest.mark.parametrize("when", ["while it sends", "while it waits"])
def test_a_client_that_hangs_up_costs_nothing(stand_in: StandIn, when: str) -> None:
    app = create_app(stand_in, Settings())

    async def hang_up() -> list[Any]:
        """Send half a request, or one whose work is queued, and go."""
        messages: list[Any] = [
            {"type": "http.request", "body": b'{"history": [7]}', "more_body": when != "while it waits"}
        ]
        sent: list[Any] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            while when == "while it waits" and app.state.batcher.depth == 0:
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": "/recommend", "raw_path": b"/recommend", "query_string": b"",
            "headers": [], "http_version": "1.1", "scheme": "http", "root_path": "", "server": None, "client": None,
        }  # fmt: skip
        await app(scope, receive, send)
        return sent

    async def work(client: Any) -> None:
        stand_in.gate.clear()
        first = asyncio.ensure_future(client.post("/recommend", json={"history": [1]}))
        while not stand_in.calls:
            await asyncio.sleep(0.001)
        await hang_up()
        assert app.state.batcher.depth == 0
        stand_in.gate.set()
        assert (await first).status_code == 200
        assert (await client.post("/recommend", json={"history": [2]})).status_code == 200
        assert 'fastm2rec_requests_total{path="/recommend",status="499"} 1.0' in (await client.get("/metrics")).text

    with_client(app, work)
    assert stand_in.calls == [[[1]], [[2]]]


def test_what_metrics_count(stand_in: StandIn) -> None:
    async def work(client: Any) -> None:
        await client.post("/recommend", json={"histories": [[1, 99, 98], [99]]})
        await client.post("/recommend", json={"history": [1], "k": 0})
        for _ in range(3):
            await client.get("/some/strange/path")
        lines = (await client.get("/metrics")).text.splitlines()
        for line in (
            'fastm2rec_requests_total{path="/recommend",status="200"} 1.0',
            'fastm2rec_requests_total{path="/recommend",status="422"} 1.0',
            'fastm2rec_requests_total{path="other",status="404"} 3.0',
            'fastm2rec_request_seconds_count{path="/recommend"} 2.0',
            "fastm2rec_batch_size_sum 2.0",
            "fastm2rec_batch_size_count 1.0",
            "fastm2rec_model_seconds_count 1.0",
            "fastm2rec_skipped_items_total 3.0",
            "fastm2rec_fallbacks_total 1.0",
            "fastm2rec_queue_depth 0.0",
        ):
            assert line in lines

    with_client(create_app(stand_in, Settings(empty="popular")), work)


def test_search_finds_ids_and_titles(stand_in: StandIn) -> None:
    async def work(client: Any) -> None:
        async def found(query: str, limit: int = 20) -> list[int]:
            answer = await client.get("/items", params={"query": query, "limit": limit})
            return [entry["item"] for entry in answer.json()["items"]]

        assert await found("amelie") == [18]
        assert await found("AMÉ") == [18]
        assert await found("2") == [2, 12, 20], "the id, then titles, then ids that begin so"
        assert await found("noir") == [20]
        assert await found("film", limit=3) == [1, 2, 3]
        assert (await found("film"))[-1] == 20, "titles that begin so come first"
        assert await found("scrip") == [19]
        assert await found("zzz") == []
        assert await found("", limit=2) == [1, 2]

    with_client(create_app(stand_in), work)


def test_search_without_titles() -> None:
    catalogue = Catalogue(None, 30)
    assert [entry["item"] for entry in catalogue.search("2", 4)] == [2, 20, 21, 22]
    assert catalogue.search("2", 1) == [{"item": 2, "title": None}]


def test_the_page_stands_alone_and_writes_text_only(stand_in: StandIn) -> None:
    async def work(client: Any) -> None:
        page = await client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert not re.search(r"https?:|\bsrc=|@import|url\(", page.text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", page.text)
        ids = set(re.findall(r'id="(\w+)"', page.text))
        assert set(re.findall(r'at\("(\w+)"\)', page.text)) <= ids

    with_client(create_app(stand_in), work)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "max_batch: expected at least 1, got 0"),
        ({"window_ms": -1.0}, "window_ms: expected 0 to 1000, got -1.0"),
        ({"unknown": "drop"}, "unknown: expected one of error, skip, got 'drop'"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with titles."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    model = M2Rec(M2RecConfig(n_items=50, max_len=8, d_model=16, d_state=2, gate="none"))
    model.vocab = Vocabulary(range(101, 151), [f"Film {item}" for item in range(50)])
    model.save_pretrained(folder)
    return folder


def test_answers_in_batches_equal_the_direct_call(folder: Path) -> None:
    pytest.importorskip("numba", reason="the cpu engine alone gives a row the same bits in every batch")
    recommender = Recommender.from_pretrained(folder, impl="cpu")
    histories = [[101 + (7 * row + 3 * place) % 50 for place in range(1 + row % 12)] for row in range(40)]
    expected = [recommender.recommend([history], 5)[0].items for history in histories]
    app = create_app(recommender, Settings(max_batch=8))

    async def work(client: Any) -> None:
        posts = [client.post("/recommend", json={"history": history, "k": 5}) for history in histories]
        for answer, direct in zip(await asyncio.gather(*posts), expected, strict=True):
            (result,) = answer.json()["results"]
            assert [(entry["item"], entry["score"]) for entry in result["items"]] == direct
        metrics = (await client.get("/metrics")).text
        calls = re.search(r"fastm2rec_batch_size_count (\d+)", metrics)
        assert calls
        assert int(calls[1]) < len(histories), "some of them shared a batch"

    with_client(app, work)


def _start(*command: str) -> tuple[subprocess.Popen[str], str]:
    """A service in a process of its own, and its address."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return process, line.split()[0]


def test_the_command_serves_a_saved_model(folder: Path) -> None:
    process, address = _start("-m", "fastm2rec.cli", "serve", "--model", str(folder), "--port", "0")
    try:
        assert address.startswith("http://127.0.0.1:")
        long = [101 + place % 37 for place in range(100_000)]
        answer = httpx.post(f"{address}/recommend", json={"history": long, "k": 4}, timeout=60)
        assert answer.status_code == 200
        (result,) = answer.json()["results"]
        (direct,) = Recommender.from_pretrained(folder).recommend([long], 4)
        assert [(entry["item"], entry["score"]) for entry in result["items"]] == direct.items
        assert re.fullmatch(r"toy@[0-9a-f]{12}", answer.json()["model"])
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) == (0, "", "")
    finally:
        process.kill()


SLOW = """
import pathlib, sys, time
from tests.test_serving import StandIn, TITLES
from fastm2rec import Vocabulary
from fastm2rec.serving import Settings, create_app
from fastm2rec.serving.server import serve

class Slow(StandIn):
    def recommend(self, *arguments, **options):
        while not pathlib.Path(sys.argv[1]).exists():
            time.sleep(0.01)
        return super().recommend(*arguments, **options)

settings = Settings()
app = create_app(Slow(Vocabulary(range(1, 21), TITLES)), settings)
serve(app, settings, "127.0.0.1", 0, lambda address: print(address, flush=True))
"""


def test_sigterm_answers_what_is_queued_and_ends_with_0(tmp_path: Path, root: Path) -> None:
    go = tmp_path / "go"
    (tmp_path / "slow.py").write_text(f"import sys; sys.path.insert(0, {str(root)!r})\n{SLOW}")
    process, address = _start(str(tmp_path / "slow.py"), str(go))
    host, port = "127.0.0.1", int(address.rpartition(":")[2])
    body = b'{"history": [5], "k": 1}'
    request = b"POST /recommend HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    try:
        clients = [socket.create_connection((host, port)) for _ in range(3)]
        for client in clients:
            client.settimeout(60)
            client.sendall(request)
        _until(lambda: "fastm2rec_queue_depth 2.0" in httpx.get(f"{address}/metrics").text)
        process.send_signal(signal.SIGTERM)
        _until(lambda: not _listens(host, port))
        assert process.poll() is None
        go.touch()
        for client in clients:
            with client, client.makefile("rb") as stream:
                answer = stream.read()
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b'{"item":4,"score":-1.0,"title":"Film 4"}' in answer
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()


def test_a_client_that_never_finishes_does_not_stop_the_shutdown(folder: Path) -> None:
    process, address = _start(
        "-m", "fastm2rec.cli", "serve", "--model", str(folder), "--impl", "reference", "--port", "0",
        "--drain-seconds", "1",
    )  # fmt: skip
    try:
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
            client.settimeout(60)
            client.sendall(b"POST /recommend HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\n{")
            httpx.get(f"{address}/healthz")  # an answer here means that the half request has been seen
            process.send_signal(signal.SIGTERM)
            assert client.recv(100).startswith(b"HTTP/1.1 503 ")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors
    finally:
        process.kill()


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def test_the_load_test_counts_what_is_wrong(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tampered(*arguments: Any) -> list[bench_serve.Question]:
        questions = make_questions(*arguments)
        questions[0].scores[0] += 1.0
        questions[1].items.reverse()
        questions[2].request = questions[2].request.replace(b"history", b"histary")
        asked.extend(questions)
        return questions

    asked: list[bench_serve.Question] = []
    make_questions = bench_serve.make_questions
    monkeypatch.setattr(bench_serve, "make_questions", tampered)
    monkeypatch.setattr(bench_serve, "QUESTIONS", 20)
    monkeypatch.setattr(bench_serve, "WARM_UP", 2)
    out = tmp_path / "serve.json"
    flags = ["--model", str(folder), "--topk", "3", "--requests", "200", "--connections", "4", "--out", str(out)]
    assert bench_serve.main(flags) == 1
    document = json.loads(out.read_text())
    alone, many = document["rows"]
    assert (alone["connections"], many["connections"], many["requests"]) == (1, 4, 200)
    for row in (alone, many):
        # The client draws questions at random from one seed, so each is asked about ten times.
        assert 0 < row["errors"] < 30
        assert 0 < row["wrong"] < 60
        assert row["lost"] == 0
        assert 0.0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["max_ms"]
    assert abs(many["max_score_difference"] - 1.0) < 1e-6
    assert [question.right is None for question in asked] == [True] * 3 + [False] * 17
    assert "Client and server shared the machine" in capsys.readouterr().out


def _serve(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """`fastm2rec serve` where it ends before it listens: the exit code and what it says."""
    from fastm2rec.cli import main

    code = main(["serve", "--port", "0", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


def test_a_folder_that_holds_no_sound_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _serve(capsys, "--model", str(tmp_path / "absent"))
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("fastm2rec serve: error: ")
    assert str(tmp_path / "absent") in said
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, said = _serve(capsys, "--model", str(tmp_path))
    assert (code, said.count("\n")) == (1, 1)


def test_popularity_that_the_model_lacks_is_found_out_at_the_start(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = _serve(capsys, "--model", str(folder), "--empty", "popular")
    assert (code, said.count("\n")) == (1, 1)
    assert "popular" in said


def test_a_port_that_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        code, said = _serve(capsys, "--model", str(folder), "--port", str(other.getsockname()[1]))
    assert code == 1
    assert re.fullmatch(r"fastm2rec serve: error: cannot listen on 127.0.0.1, port \d+: .*in use\n", said)


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("fastm2rec.serving")]:
        monkeypatch.delitem(sys.modules, name)
    said = 'the service needs uvicorn, which is not installed: pip install "fastm2rec[serve]"'
    assert _serve(capsys, "--model", "anywhere") == (1, f"fastm2rec serve: error: {said}\n")

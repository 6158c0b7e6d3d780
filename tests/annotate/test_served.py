"""A real HTTP server at the other end: answers, images, errors that pass and errors that stay."""

import base64
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from curation.annotate.chat_server import ChatServer
from curation.annotate.prompts import Ask
from curation.annotate.served import Served


def answer(text):
    return 200, {"choices": [{"message": {"content": text}}]}


class Server:
    """Replies by `reply(body, count)`, where count is how often this very text was asked before."""

    def __init__(self, reply):
        self.bodies, self.headers, seen, lock = [], [], Counter(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    key = json.dumps(body["messages"])
                    count = seen[key]
                    seen[key] += 1
                status, content = reply(body, count)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


ASK = {"p": Ask(steps="Say it anew: {caption}", role="rewrite")}


def annotator(url, *, images=False, prompts=ASK, attempts=3, timeout_seconds=5.0, **more):
    server = ChatServer(
        url=url, attempts=attempts, timeout_seconds=timeout_seconds, backoff_seconds=0.01
    )
    return Served(server=server, model="m-1", prompts=prompts, images=images, **more)


def samples(count):
    return [{"uid": f"u{n}", "caption": f"thing number {n}"} for n in range(count)]


def asked(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def texts(rows):
    return [[caption["text"] for caption in row["captions_served"]] for row in rows]


def reasons(rows):
    return [[entry["reason"] for entry in row["served_refused"]] for row in rows]


def test_answers_come_back_in_order_whatever_finishes_first(serve):
    def reply(body, count):
        number = int(asked(body).split()[-1])
        time.sleep(0.002 * (9 - number))
        return answer(f"some thing {number}")

    server = serve(reply)
    made = annotator(server.url, temperature=0.7, extra={"top_k": 5}, seed=11)
    rows = made.annotate(samples(10))
    assert texts(rows) == [[f"some thing {n}"] for n in range(10)]
    pa.Table.from_pylist(rows, schema=pa.schema(made.columns.items()))
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["top_k"], body["seed"]) == ("m-1", 0.7, 5, 11)
    entry = rows[0]["captions_served"][0]
    assert entry["model"] == "m-1" and json.loads(entry["sampling"])["top_k"] == 5


def test_the_image_travels_as_a_data_url_with_its_own_bytes(serve, make_picture):
    server = serve(lambda body, count: answer("a noisy square"))
    batch = [{"uid": "u", "caption": "x y", "image": make_picture(1, "JPEG")}]
    batch.append({"uid": "v", "caption": "x y", "image": b"broken"})
    rows = annotator(server.url, images=True).annotate(batch)
    (body,) = server.bodies
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(";base64,")
    assert kind == "data:image/jpeg" and base64.b64decode(data) == batch[0]["image"]
    assert texts(rows) == [["a noisy square"], []]
    assert reasons(rows) == [[], ["image_not_an_image"]]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_that_pass_are_tried_again(serve, status):
    server = serve(lambda body, n: answer("here we are") if n == 2 else (status, b"busy"))
    assert texts(annotator(server.url).annotate(samples(2))) == [["here we are"]] * 2
    assert len(server.bodies) == 6


def test_errors_that_stay_are_counted_by_reason(serve):
    def reply(body, count):
        number = int(asked(body).split()[-1])
        return {
            0: (400, b"too long"),
            1: (200, b"<html>"),
            2: (200, {"choices": []}),
            3: answer(None),
            4: answer(""),
        }.get(number, answer("a fine answer"))

    server = serve(reply)
    rows = annotator(server.url, max_failed_fraction=0.5).annotate(samples(10))
    assert reasons(rows)[:6] == [
        ["http_400"],
        ["bad_answer"],
        ["bad_answer"],
        ["bad_answer"],
        ["no_answer"],
        [],
    ]
    assert len(server.bodies) == 10  # none of these is tried again
    with pytest.raises(ValueError, match=r"4 of 10 .*bad_answer.*max_failed_fraction=0\.3"):
        annotator(server.url, max_failed_fraction=0.3).annotate(samples(10))


def test_a_slow_answer_is_a_timeout_of_that_sample(serve):
    def reply(body, count):
        if asked(body).endswith(" 3"):
            time.sleep(1.5)
        return answer("here we are")

    rows = annotator(serve(reply).url, timeout_seconds=0.4, attempts=2).annotate(samples(8))
    assert reasons(rows)[3] == ["timeout"] and sum(map(len, texts(rows))) == 7


def test_a_server_that_is_down_names_the_knob(serve):
    server = serve(lambda body, count: answer("x"))
    url = server.url
    server.close()
    server.http.server_close()
    with pytest.raises(ValueError, match=r"does not answer after 3 attempts.*server\.url"):
        annotator(url).annotate(samples(3))


@pytest.mark.parametrize("status", [401, 404])
def test_wrong_key_model_or_address_stop_the_run(serve, status):
    with pytest.raises(ValueError, match=rf"HTTP {status}.*check url, model and key_variable"):
        annotator(serve(lambda body, count: (status, b"no")).url).annotate(samples(2))


def test_the_key_comes_from_the_environment(serve, monkeypatch):
    server = serve(lambda body, count: answer("here we are"))
    client = ChatServer(url=server.url + "/", key_variable="SOME_KEY")
    made = Served(server=client, model="m", prompts=ASK, images=False)
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ValueError, match="key_variable=SOME_KEY"):
        made.annotate(samples(1))
    monkeypatch.setenv("SOME_KEY", "abc")
    made.annotate(samples(1))
    assert server.headers[-1]["Authorization"] == "Bearer abc"


def test_steps_and_json_through_a_server(serve):
    def reply(body, count):
        if "describe" in asked(body):
            return answer("a red kite")
        return answer(json.dumps({"long": asked(body), "neg": "a green kite flies"}))

    fields = {"long": "long", "neg": "negative"}
    two = Ask(steps=["describe", "fuse {caption} with {answer}"], answer="json", fields=fields)
    rows = annotator(serve(reply).url, prompts={"two": two}).annotate(samples(1))
    found = [(c["role"], c["text"]) for c in rows[0]["captions_served"]]
    assert found == [
        ("long", "fuse thing number 0 with a red kite"),
        ("negative", "a green kite flies"),
    ]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="url 'localhost"):
        ChatServer(url="localhost:8000")
    with pytest.raises(ValueError, match="prompts is empty"):
        annotator("http://h/v1", prompts={})
    with pytest.raises(ValueError, match="concurrency=0"):
        annotator("http://h/v1", concurrency=0)

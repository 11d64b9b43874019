"""A tiny model behind the part of vLLM's API that labeling uses, with faults on demand, for the tests.

The form of the answers is that of vLLM's source, see `transformers_s2t.labeling.http_teacher.HTTPTeacher`.
"""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class TinyServer:
    """Serves on a port of its own. `faults` are taken one per POST, first come: each is a name of `_Handler`. Those
    POSTs that ask for named tokens take `point_faults` first."""

    def __init__(self, model, name="tiny-teacher", key=None, max_logprobs=97, old=False, delay=0.0):
        self.model, self.name, self.key, self.max_logprobs = model, name, key, max_logprobs
        self.old, self.delay = old, delay  # old: a vLLM that does not know `logprob_token_ids`
        self.max_model_len = 128
        self.other_names = []  # of models that it says to offer as well
        self.faults, self.point_faults, self.bodies, self.keys = [], [], [], []
        self.running = self.most = 0
        self.asked = threading.Event()  # a POST has come
        self.gate = threading.Event()  # what a "held" answer waits for
        self.hung_up = threading.Event()  # the client, while an answer dripped
        self.lock = threading.Lock()
        self.http = None
        self.open = set()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.http = _Server(("127.0.0.1", self.port), _Handler)
        self.http.owner = self
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        if self.http is not None:
            self.http.shutdown()
            self.http.server_close()
            self.http = None
            for connection in list(self.open):  # threads of their own would go on answering
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # closed by itself
            self.open.clear()

    def restart(self, seconds):
        """Down for a moment, from another thread: a server cannot wait for itself."""

        def work():
            if self.http is None:
                return
            self.stop()
            time.sleep(seconds)
            self.start()

        threading.Thread(target=work, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    @torch.no_grad()
    def answer(self, body):
        """(status, answer) of /v1/completions."""
        ids, k = body["prompt"], body.get("prompt_logprobs")
        if body["model"] != self.name:
            return 404, _error(f"The model {body['model']} does not exist.")
        if len(ids) + body["max_tokens"] > self.max_model_len:
            return 400, _error("This model's maximum context length is exceeded.")
        if k is not None and k > self.max_logprobs:
            return 400, _error(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            )
        logp_TV = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None, "prompt_logprobs": None}
        if k is not None:
            choice["prompt_logprobs"] = [None]
            for token, logp_V in zip(ids[1:], logp_TV):
                rank = int((logp_V >= logp_V[token]).sum())
                entry = {str(token): {"logprob": float(logp_V[token]), "rank": rank, "decoded_token": "x"}}
                for place, id in enumerate(logp_V.topk(k).indices.tolist(), 1):
                    entry[str(id)] = {"logprob": float(logp_V[id]), "rank": place, "decoded_token": "x"}
                choice["prompt_logprobs"].append(entry)
        if body.get("logprobs") is not None:
            logp_V = logp_TV[-1]
            sampled = int(logp_V.argmax())
            wanted = None if self.old else body.get("logprob_token_ids")
            wanted = logp_V.topk(body["logprobs"]).indices.tolist() if wanted is None else wanted
            assert body["return_tokens_as_token_ids"]
            named = {f"token_id:{id}": float(logp_V[id]) for id in [sampled, *wanted]}
            choice["logprobs"] = {
                "text_offset": [0],
                "tokens": [f"token_id:{sampled}"],
                "token_logprobs": [float(logp_V[sampled])],
                "top_logprobs": [named],
            }
        return 200, {"object": "text_completion", "model": self.name, "choices": [choice], "usage": {}}


def _error(message):
    return {"error": {"message": message, "type": "BadRequestError", "code": 400}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def process_request(self, request, client_address):
        self.owner.open.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        pass  # clients that gave up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, data, **headers):
        payload = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(payload), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(payload)

    def allowed(self):
        owner, key = self.server.owner, self.headers.get("Authorization")
        owner.keys.append(key)
        if owner.key is None or key == f"Bearer {owner.key}":
            return True
        self.send(401, {"error": f"Unauthorized: {key}"})
        return False

    def do_GET(self):
        owner = self.server.owner
        if self.path != "/v1/models":
            self.send(404, {})
        elif self.allowed():
            names = [*owner.other_names, owner.name]
            cards = [{"id": name, "object": "model", "max_model_len": owner.max_model_len} for name in names]
            self.send(200, {"object": "list", "data": cards})

    def do_POST(self):
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        with owner.lock:
            owner.running += 1
            owner.most = max(owner.most, owner.running)
            owner.bodies.append(body)
            owner.asked.set()
            faults = owner.point_faults if "logprob_token_ids" in body and owner.point_faults else owner.faults
            fault = faults.pop(0) if faults else None
        try:
            if owner.delay:
                time.sleep(owner.delay)
            status, answer = owner.answer(body)
            if fault is None or status == 400:
                status_and_answer = (status, answer)
            else:
                status_and_answer = getattr(self, f"fault_{fault}")(status, answer)
        finally:
            with owner.lock:
                owner.running -= 1
        if status_and_answer is not None:
            self.send(*status_and_answer)

    def fault_error(self, status, answer):
        return 500, _error("Internal Server Error")

    def fault_unavailable(self, status, answer):
        return 503, b"<html>no upstream</html>"

    def fault_busy(self, status, answer):
        self.send(429, _error("Too many requests"), Retry_After="0.05")

    def fault_dropped(self, status, answer):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def fault_half(self, status, answer):
        """The length says more than comes."""
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload[: len(payload) // 2])
        self.close_connection = True

    def fault_cut(self, status, answer):
        """A whole answer that is half a JSON text."""
        payload = json.dumps(answer).encode()
        return 200, payload[: len(payload) // 2]

    def fault_slow(self, status, answer):
        time.sleep(0.8)
        return status, answer

    def fault_held(self, status, answer):
        self.server.owner.gate.wait(30)
        return status, answer

    def fault_drip(self, status, answer):
        """Byte by byte until the client has enough, or a third of a minute at most."""
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.close_connection = True
        try:
            for byte in payload[:200]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            self.server.owner.hung_up.set()

    def fault_restart(self, status, answer):
        self.server.owner.restart(0.4)
        self.fault_dropped(status, answer)

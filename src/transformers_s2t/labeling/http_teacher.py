"""A teacher behind an OpenAI-compatible server with `prompt_logprobs`, such as vLLM."""

from __future__ import annotations

import json
import math
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future
from concurrent.futures import wait as wait_for
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import requests
import torch
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError

from transformers_s2t.labeling.teachers import Comparison
from transformers_s2t.labels.schema import MISSING_LOGPROB


_FLOOR = -9999.0  # what vLLM writes for minus infinity
_CONNECT_TIMEOUT = 10.0  # seconds
_MAX_WAIT = 30.0  # seconds between two attempts
_START_RETRIES = 2  # a wrong address should not take minutes to be reported
_BLOCK_BYTES = 1 << 16
_PLACEHOLDER = re.compile(r"token_id:(\d+)")


class TeacherError(RuntimeError):
    """The server did not answer, or not with what was asked for. Never holds the key."""


class HTTPTeacher:
    """A model behind an OpenAI-compatible vLLM server.

    One request reads a whole trajectory: `prompt` is its token ids, `prompt_logprobs` asks for the best tokens at
    every position. A candidate that is not among them is asked for by id, at the chosen points only. What `prefetch`
    began is kept until it is read. The first request that fails for good ends all others.

    The requests rely on what follows, read in vLLM's source (`vllm/entrypoints/openai/completion/protocol.py` at
    002032ee, `.../completion/serving.py` at 030ea52e, `vllm/sampling_params.py` at 00388f65), not tried on a live vLLM
    here:

    - `prompt` may be a list of token ids; prompt and `max_tokens` together must fit into `max_model_len`.
    - `prompt_logprobs=k` gives `choices[0].prompt_logprobs`: one entry for each token, the first null, then
      {token id: {"logprob", "rank", "decoded_token"}} with the best k and the token of the text itself, in or out of
      them; -9999.0 stands for minus infinity. `k` may be `--max-logprobs` (20 unless the server says otherwise) at
      most. Such requests do not read the prefix cache.
    - `logprob_token_ids` (in the OpenAI routes since pull request 43463, merged in July 2026) needs `logprobs`, at
      first with the same count; it gives `choices[0].logprobs.top_logprobs[0]` with those ids and the sampled token.
      An older server ignores the field, which raises an error at the start.
    - `return_tokens_as_token_ids` makes the keys there "token_id:17".
    - Values are those of the raw logits unless the server runs with another `--logprobs-mode`. All sampling settings
      are sent as neutral, so that the checkpoint's own generation config changes nothing in the processed mode either.

    Args:
        url: address of the server, with or without "/v1"; must hold no key.
        model: name of the model there; needed where the server offers several and none is `default_model`.
        default_model: taken where `model` is not given and the server offers it beside others: vLLM serves a model
            under the name it was loaded by, so the Hub id is a good guess.
        api_key_env: environment variable with the key; no key is sent where it is not set.
        max_concurrency: requests under way at one time.
        timeout: seconds until a request whose answer is not complete is given up and repeated; up to twice as many
            where the server falls silent in the middle of its answer.
        max_retries: further attempts after a 5xx or 429 status, a lost connection, a timeout or half an answer, with
            waits that double from `backoff` seconds up to 30; 8 outlast a restart of about a minute and a half.
        top_logprobs: k, the number of best tokens named at each position.
        num_embeddings: number of token ids that the model has, where known; candidates above are not asked for.
        backoff: first wait, in seconds.

    Raises:
        ValueError: for illegal arguments, or a model that the server does not offer.
        TeacherError: where the server is not there, or cannot do what is needed.
    """

    unreadable_ids: Sequence[int] = ()
    numbers_per_position = 0
    cross_tokenizer: Mapping[str, Any] = {}

    def __init__(
        self,
        url: str,
        model: str | None = None,
        default_model: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 16,
        timeout: float = 300.0,
        max_retries: int = 8,
        top_logprobs: int = 20,
        num_embeddings: int | None = None,
        backoff: float = 0.5,
    ):
        for name, value, low in (
            ("max_concurrency", max_concurrency, 1),
            ("max_retries", max_retries, 0),
            ("top_logprobs", top_logprobs, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"`{name}` must be an integer of at least {low}, got {value!r}.")
        for name, value in (("timeout", timeout), ("backoff", backoff)):
            if not value > 0:
                raise ValueError(f"`{name}` must be above 0 seconds, got {value!r}.")
        self.url = _base_url(url)
        self.max_concurrency, self.timeout, self.max_retries = max_concurrency, timeout, max_retries
        self.top_logprobs, self.num_embeddings, self.backoff = top_logprobs, num_embeddings, backoff
        self._auth = _KeyFromEnvironment(api_key_env)
        self._session = requests.Session()
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=max_concurrency, pool_block=True)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)
        self._calls = _Calls(max_concurrency)
        self._stop = threading.Event()
        self._begun: dict[tuple[tuple[int, ...], int], Future] = {}  # (token ids, prompt length) -> what is said of it
        self.model, self.max_length = self._find_model(model, default_model)
        self.source = host_free(self.model)
        # fail now and not after an hour of rollouts
        self._best_tokens([0, 0], 1)
        self._next_token([0], [0])

    def count_tokens(self, ids: Sequence[int], prompt_length: int) -> int:
        return len(ids)

    def prefetch(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> None:
        self._results([future for future in self._begun.values() if future.done()])  # raise failures now
        for ids, prompt_length in zip(sequences, prompt_lengths):
            key = tuple(ids), prompt_length
            if key not in self._begun:
                self._begun[key] = self._calls.begin(self._best_tokens, ids, prompt_length, self._stop)

    def read(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> _TopReading:
        self.prefetch(sequences, prompt_lengths)
        keys = [(tuple(ids), prompt_length) for ids, prompt_length in zip(sequences, prompt_lengths)]
        begun = {key: self._begun.pop(key) for key in set(keys)}
        return _TopReading(self, [begun[key] for key in keys])

    def logprobs_of(self, sequences, prompt_lengths, positions, ids) -> list[list[list[float]]]:
        prefixes = [sequence[:at] for sequence, at_N in zip(sequences, positions) for at in at_N]
        wanted = [one for ids_N in ids for one in ids_N]
        futures = [self._calls.begin(self._next_token, *row, self._stop) for row in zip(prefixes, wanted)]
        found = iter(self._results(futures))
        return [[next(found) for _ in ids_N] for ids_N in ids]

    def cancel(self) -> None:
        self._begun.clear()
        self._calls.drop_waiting()
        self._stop.set()  # ends the waits for another attempt
        self._stop = threading.Event()

    def _results(self, futures: Sequence[Future]) -> list:
        try:
            for future in wait_for(futures, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises what went wrong, whichever request it was
            return [future.result() for future in futures]
        except BaseException:
            self.cancel()
            raise

    def _find_model(self, model: str | None, default_model: str | None) -> tuple[str, int | None]:
        answer = self._ask("GET", "models", None, min(self.max_retries, _START_RETRIES))
        try:
            offered = {one["id"]: one.get("max_model_len") for one in answer["data"]}
        except (KeyError, TypeError, AttributeError):
            offered = {}
        if not offered:
            raise TeacherError(f"{self.url}/models lists no model: it is no OpenAI-compatible server.")
        if model is None and len(offered) > 1 and default_model not in offered:
            raise ValueError(f"`model` is required: {self.url} offers {sorted(offered)}.")
        if model is not None and model not in offered:
            raise ValueError(f"`model` must be one of {sorted(offered)}, which {self.url} offers, got {model!r}.")
        if model is None:
            model = default_model if default_model in offered else next(iter(offered))
        length = offered[model]
        return model, None if length is None else length - 1  # one token is generated, and thrown away

    def _complete(self, prompt: Sequence[int], stop: threading.Event | None, **settings: Any) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        answer = self._ask("POST", "completions", body | settings, self.max_retries, stop)
        try:
            return dict(answer["choices"][0])
        except (KeyError, TypeError, IndexError, ValueError):
            raise TeacherError(f"{self.url}/completions answered without `choices`.") from None

    def _best_tokens(
        self, ids: Sequence[int], prompt_length: int, stop: threading.Event | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and log-probabilities (S, N) at every position from `prompt_length` on, best first; -1 and -inf
        where a position has fewer. A whole shard of these is kept, and dictionaries would take five times as much."""
        choice = self._complete(ids, stop, prompt_logprobs=self.top_logprobs)
        entries = choice.get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(ids):
            found = len(entries) if isinstance(entries, list) else "no"
            raise TeacherError(
                f"{self.url}/completions gave {found} `prompt_logprobs` for {len(ids)} tokens: it must be vLLM."
            )
        try:
            rows = [
                {int(id): self._checked(one["logprob"]) for id, one in row.items()} for row in entries[prompt_length:]
            ]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TeacherError(f"{self.url}/completions gave `prompt_logprobs` of another form than vLLM's.") from None
        if any(id not in row for id, row in zip(ids[prompt_length:], rows)):
            raise TeacherError(f"{self.url}/completions gave `prompt_logprobs` that lack the tokens of the text.")
        width = max(map(len, rows), default=0)
        ids_SN = torch.full((len(rows), width), -1)
        logprobs_SN = torch.full((len(rows), width), -math.inf, dtype=torch.float64)
        for s, row in enumerate(rows):
            best_first = sorted(row.items(), key=lambda item: (-item[1], item[0]))
            ids_SN[s, : len(row)] = torch.tensor([id for id, _ in best_first])
            logprobs_SN[s, : len(row)] = torch.tensor([value for _, value in best_first], dtype=torch.float64)
        return ids_SN, logprobs_SN

    def _next_token(
        self, prefix: Sequence[int], ids: Sequence[int], stop: threading.Event | None = None
    ) -> list[float]:
        """Log-probabilities of exactly these next tokens."""
        choice = self._complete(
            prefix, stop, logprobs=len(ids), logprob_token_ids=list(ids), return_tokens_as_token_ids=True
        )
        try:
            named = choice["logprobs"]["top_logprobs"][0]
            found = {int(_PLACEHOLDER.fullmatch(key).group(1)): self._checked(value) for key, value in named.items()}
        except (KeyError, TypeError, IndexError, ValueError, AttributeError):
            found = {}
        missing = [id for id in ids if id not in found]
        if missing:
            raise TeacherError(
                f"{self.url}/completions did not give the log-probabilities of the token ids {missing}: the server "
                "must know `logprob_token_ids` (vLLM from July 2026 on)."
            )
        return [found[id] for id in ids]

    @staticmethod
    def _checked(value: Any) -> float:
        value = float(value)
        if not value <= 1e-3:
            raise ValueError("no log-probability")
        return MISSING_LOGPROB if value <= _FLOOR else min(value, 0.0)

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        max_retries: int,
        stop: threading.Event | None = None,
    ) -> Any:
        """The answer's JSON. Waits and asks again where that may help, unless told to stop."""
        stop = threading.Event() if stop is None else stop
        for attempt in range(max_retries + 1):
            answer, problem, wait = self._ask_once(method, path, body)
            if problem is None:
                return answer
            if wait is None:
                break
            if attempt < max_retries:
                # jitter, so that requests that failed together are not all repeated at one moment
                longest = min(self.backoff * 2**attempt, _MAX_WAIT)
                if stop.wait(max(min(wait, _MAX_WAIT), longest * random.uniform(0.5, 1.0))):
                    break
        # outside of any `except`: what `requests` raised holds the request, and with it the key
        raise TeacherError(f"{self.url}/{path}: {problem} (attempt {attempt + 1} of {max_retries + 1}).")

    def _ask_once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[Any, str | None, float | None]:
        """(answer, problem, seconds to wait at least before asking again, or None where that cannot help)."""
        deadline = time.monotonic() + self.timeout
        content = bytearray()
        try:
            with self._session.request(
                method,
                f"{self.url}/{path}",
                json=body,
                auth=self._auth,
                timeout=(min(self.timeout, _CONNECT_TIMEOUT), self.timeout),
                allow_redirects=False,
                stream=True,
            ) as response:
                # `requests` would restart its timeout at every byte, and might never end; `read1` gives what is there
                while block := response.raw.read1(_BLOCK_BYTES, decode_content=True):
                    content += block
                    if time.monotonic() > deadline:
                        raise requests.Timeout
        except (requests.Timeout, ReadTimeoutError):
            return None, f"no answer within {self.timeout:g} seconds", 0.0
        except (requests.ConnectionError, ProtocolError) as error:
            return None, f"the connection failed ({type(error).__name__})", 0.0
        except (requests.RequestException, HTTPError) as error:
            return None, f"the request failed ({type(error).__name__})", None
        status = response.status_code
        if status == 429 or status >= 500:
            wait = _seconds(response.headers.get("Retry-After"))
            return None, f"status {status}: {_message_of(content, self._auth)}", wait
        if status != 200:
            hint = f"; is {self._auth.variable} set?" if status in (401, 403) else ""
            return None, f"status {status}: {_message_of(content, self._auth)}{hint}", None
        try:
            return json.loads(content), None, None
        except ValueError:
            return None, f"status {status}, but the answer is cut off or no JSON", 0.0


class _Calls:
    """Function calls in `size` threads at most, which end when nothing is left to do.

    Unlike a `ThreadPoolExecutor`'s threads, they do not keep a process from ending: after Ctrl-C it does not wait for
    a server that may take minutes to answer.
    """

    def __init__(self, size: int):
        self.size = size
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future, Callable, tuple]] = deque()
        self._running = 0

    def begin(self, function: Callable, *args: Any) -> Future:
        future = Future()
        with self._lock:
            self._waiting.append((future, function, args))
            if self._running < self.size:
                threading.Thread(target=self._work, name="s2t-teacher", daemon=True).start()
                self._running += 1
        return future

    def drop_waiting(self) -> None:
        with self._lock:
            dropped, self._waiting = self._waiting, deque()
        for future, _, _ in dropped:  # a reading that still waits must not do so for ever
            future.set_exception(TeacherError("not asked, as another request failed or the run was stopped."))

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, function, args = self._waiting.popleft()
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)


class _KeyFromEnvironment(AuthBase):
    """Adds the key to a request. It is read anew each time, so that no attribute holds it to be printed or stored.

    Passed as `auth`, not as a header, because `requests` would replace a header by what it finds in ~/.netrc.
    """

    def __init__(self, variable: str):
        self.variable = variable
        if not re.fullmatch(r"[\x21-\x7e]*", self._key()):
            raise ValueError(f"the environment variable {variable} must hold a key of printable characters.")

    def _key(self) -> str:
        return os.environ.get(self.variable, "").strip()

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if key := self._key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def hide(self, text: str) -> str:
        """`text` without the key: a server may repeat it in its message."""
        key = self._key()
        for form in {key, json.dumps(key)[1:-1]} - {""}:
            text = text.replace(form, "***")
        return text


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "`url` must hold neither a user, a password nor a query; the key is taken from the environment."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"`url` must be like http://host:8000, got {url!r}.")
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def host_free(name: str) -> str:
    """A served model's name for publication: only the last part, where it is a path on the server's disk."""
    return (
        re.split(r"[/\\]", name.rstrip("/\\"))[-1] if name.startswith(("/", ".", "~", "\\")) or ":" in name else name
    )


def _message_of(content: bytes, auth: _KeyFromEnvironment) -> str:
    """The server's own message without the key, on one line of at most 300 characters."""
    text = content.decode(errors="replace")
    try:
        data = json.loads(content)
        text = str((data.get("error") or data).get("message") or text)
    except (ValueError, AttributeError):
        pass
    text = " ".join(auth.hide(text).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _seconds(retry_after: str | None) -> float:
    try:
        seconds = float(retry_after)
    except (TypeError, ValueError):
        return 0.0
    return seconds if 0 < seconds < math.inf else 0.0


class _TopReading:
    """The tokens that a server names at each generated position; waits for them when they are needed."""

    def __init__(self, teacher: HTTPTeacher, futures: Sequence[Future]):
        self.teacher, self.futures = teacher, futures
        self.top_logprobs, self.num_rows = teacher.top_logprobs, teacher.num_embeddings

    @cached_property
    def rows(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self.teacher._results(self.futures)

    def compare(self, b: int, where: slice, logits_SV: torch.Tensor, candidate_ids_SK: torch.Tensor) -> Comparison:
        ids_SN, logprobs_SN = (named_SN[where].to(logits_SV.device) for named_SN in self.rows[b])
        same_SKN = candidate_ids_SK[:, :, None] == ids_SN[:, None, :]
        logprobs_SK = logprobs_SN[:, None, :].masked_fill(~same_SKN, -math.inf).amax(-1)
        logprobs_SK = logprobs_SK.masked_fill(~same_SKN.any(-1), math.nan)
        if self.num_rows is not None:
            logprobs_SK = logprobs_SK.masked_fill(candidate_ids_SK >= self.num_rows, MISSING_LOGPROB)
        # best first, and at least the token of the text is one that the student has
        first_S1 = (ids_SN < logits_SV.shape[-1]).int().argmax(-1, keepdim=True)
        return Comparison(
            divergence_S=coarse_divergence(logits_SV, ids_SN, logprobs_SN, self.top_logprobs, self.num_rows),
            logprobs_SK=logprobs_SK.float(),
            top_id_S=ids_SN.gather(-1, first_S1)[:, 0],
        )


def coarse_divergence(
    logits_SV: torch.Tensor,
    ids_SN: torch.Tensor,
    logprobs_SN: torch.Tensor,
    top_logprobs: int,
    num_teacher_rows: int | None = None,
) -> torch.Tensor:
    """A lower bound of `triggers.kl_divergence` (S,), nats, where the teacher names some of its tokens only.

    It is the divergence on a coarser partition: each named token by itself, all others together. Merging outcomes can
    only lower a divergence (data-processing inequality), and nothing is lost where all tokens are named. The named
    ones are the teacher's best k and the token of the text, so what is lost is the disagreement among tokens that the
    teacher finds improbable and the student did not write.

    Tokens that the student may not write (logit -inf) are renormalised away, as in `kl_divergence`. How much of the
    teacher's unnamed mass lies on them is not known. It is at most their number times the k-th best probability; the
    value in that range with the lowest divergence is taken. Rows that only the teacher's head has are renormalised
    away where they are named, and taken to be empty otherwise: they are padding.

    Args:
        logits_SV: the student's, -inf where it may not write.
        ids_SN: tokens that the teacher names, best first; -1 where a position has fewer.
        logprobs_SN: their log-probabilities over the teacher's vocabulary, nats.
        top_logprobs: k, how many of them are the teacher's best.
        num_teacher_rows: rows of the teacher's head; `None` for as many as the student's.
    """
    shared = logits_SV.shape[-1] if num_teacher_rows is None else min(logits_SV.shape[-1], num_teacher_rows)
    student_SV = torch.log_softmax(logits_SV[..., :shared].double(), dim=-1)
    named_SN, inside_SN = ids_SN >= 0, (ids_SN >= 0) & (ids_SN < shared)
    prob_SN = logprobs_SN.double().exp()
    scale_S1 = (1 - (prob_SN * (named_SN & ~inside_SN)).sum(-1, keepdim=True)).clamp_min(1e-12)
    prob_SN = (prob_SN * inside_SN) / scale_S1
    # the column `shared` takes what does not belong to the vocabulary
    where_SN = ids_SN.masked_fill(~inside_SN, shared)
    padded_SV = torch.cat([student_SV, torch.full_like(student_SV[:, :1], -math.inf)], dim=-1)
    student_SN = padded_SV.gather(-1, where_SN)
    said_SN = prob_SN.masked_fill(torch.isinf(student_SN), 0.0)
    difference_SN = (prob_SN.log() - student_SN).masked_fill(said_SN == 0, 0.0)
    named_part_S, said_S = (said_SN * difference_SN).sum(-1), said_SN.sum(-1)

    rest_SV = padded_SV.scatter(-1, where_SN, -math.inf)[:, :shared]
    student_rest_S = torch.logsumexp(rest_SV, dim=-1)
    most_S = (1 - prob_SN.sum(-1)).clamp_min(0.0)
    forbidden_S = torch.isinf(student_SV).sum(-1) - (torch.isinf(student_SN) & inside_SN).sum(-1)
    kth_S = (logprobs_SN[:, : min(top_logprobs, logprobs_SN.shape[-1])].double().exp() / scale_S1).amin(-1)
    least_S = (most_S - forbidden_S * kth_S).clamp_min(0.0)
    # with `mass` on the tokens that are not named, the divergence is convex in said / (said + mass); its lowest point
    # is where both sides give the rest the same odds against what is named, as the teacher divides that
    best_S = (named_part_S / said_S + student_rest_S).exp()
    mass_S = torch.minimum(torch.maximum(best_S.nan_to_num(0.0), least_S), most_S)
    mass_S = mass_S.masked_fill(torch.isinf(student_rest_S), 0.0)
    rest_part_S = (mass_S * (mass_S.log() - student_rest_S)).masked_fill(mass_S == 0, 0.0)
    total_S = said_S + mass_S
    bound_S = (named_part_S + rest_part_S) / total_S - total_S.log()
    return bound_S.masked_fill(total_S == 0, 0.0).clamp_min(0.0).float()

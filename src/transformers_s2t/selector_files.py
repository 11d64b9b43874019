"""Where the files of a selector lie, in a local folder or in a repository of the Hub.

The adapter lies in a folder of its own, `s2t/`. Were it beside `s2t_config.json`, then PEFT, `from_pretrained`,
`pipeline` and others would load it as an ordinary adapter, switch it on for every token, and ruin the text. In its
place lies an `adapter_config.json` that describes no adapter: whoever loads it gets an error that names
[`LocalSelector`].
"""

from __future__ import annotations

import os
import posixpath
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitInfo, HfApi
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME, S2T_CONFIG_NAME, SEEN_PROBLEMS_NAME
from transformers_s2t.files import atomic_write, write_json
from transformers_s2t.selector_card import CARD_NAME, calibration_of


#: Folder of the adapter's own files, in the selector's.
ADAPTER_FOLDER = "s2t"
HOW_TO_LOAD = "an S2T selector, to be loaded by transformers_s2t.LocalSelector.from_pretrained(folder, model)"
#: What is published of a selector's folder. Training leaves more there, secrets among it.
PUBLISHED = (
    CARD_NAME,
    S2T_CONFIG_NAME,
    ROUTER_WEIGHTS_NAME,
    CALIBRATION_NAME,
    SEEN_PROBLEMS_NAME,
    ADAPTER_CONFIG_NAME,
    f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_NAME}",
    f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS_NAME}",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    # the tokenizer
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "*.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    # a base model
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
_COPIED = (SEEN_PROBLEMS_NAME, CALIBRATION_NAME)
_CUSTOM_GENERATE = {
    "generate.py": '''"""Decodes with the S2T selector of this repository.

model.generate(**inputs, custom_generate="this repository", trust_remote_code=True)
"""

from transformers_s2t.decoding.repository import generate  # noqa: F401
''',
    "requirements.txt": "transformers-s2t\n",
}
# one becomes PEFT's error, the other that of transformers, before either reads a weight
_NO_ADAPTER = {"peft_type": HOW_TO_LOAD, "base_model_name_or_path": HOW_TO_LOAD}


class AdapterPlace(NamedTuple):
    """Where an adapter was found.

    Args:
        folder: local folder of its files, downloaded where need be.
        is_guarded: whether PEFT and transformers leave it alone.
    """

    folder: Path
    is_guarded: bool

    @property
    def weights(self) -> str:
        return str(self.folder / ADAPTER_WEIGHTS_NAME)


def find_file(path: str | os.PathLike, name: str, **hub_kwargs) -> str | None:
    """The path of a file, which is downloaded where need be; `None` where there is no such file.

    Args:
        path: local folder or Hub repository.
        name: name of the file.
        hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder` ... as in `from_pretrained` of transformers.

    Raises:
        OSError: where there is no such folder or repository, or it cannot be reached.
    """
    return cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def find_adapter(path: str | os.PathLike, **hub_kwargs) -> AdapterPlace:
    """Where the adapter of a selector lies.

    Args:
        path: local folder or Hub repository.
        hub_kwargs: as in [`find_file`].

    Raises:
        FileNotFoundError: where the folder or repository holds none.
        OSError: as in [`find_file`].
    """
    above, error = hub_kwargs.pop("subfolder", ""), None
    for inner in (ADAPTER_FOLDER, ""):
        where = hub_kwargs | {"subfolder": posixpath.join(above, inner)}
        try:
            weights = find_file(path, ADAPTER_WEIGHTS_NAME, **where)
            if weights is not None and find_file(path, ADAPTER_CONFIG_NAME, **where) is not None:
                return AdapterPlace(Path(weights).parent, is_guarded=bool(inner))
        except OSError as first:  # without a connection the other place may be in the cache
            error = error or first
    raise error or FileNotFoundError(
        f"{str(path)!r} holds no {ADAPTER_WEIGHTS_NAME} with its {ADAPTER_CONFIG_NAME}: the adapter itself is missing."
    )


def adapter_folder(folder: str | os.PathLike) -> Path:
    """The folder of the adapter's own files, in the local folder of a selector."""
    inner = Path(folder) / ADAPTER_FOLDER
    return inner if (inner / ADAPTER_WEIGHTS_NAME).is_file() else Path(folder)


class SelectorFiles(NamedTuple):
    """What lies beside a selector's adapter and is copied with it, as it was read.

    Args:
        copied: name -> bytes of a file that is copied as it is.
        calibration: section of the card that calibration wrote, `None` for none.
        processing_class: the tokenizer that the selector was loaded with, `None` for none.
    """

    copied: dict[str, bytes] = {}
    calibration: str | None = None
    processing_class: PreTrainedTokenizerBase | None = None

    @classmethod
    def read(
        cls, path: str | os.PathLike, processing_class: PreTrainedTokenizerBase | None = None, **hub_kwargs
    ) -> SelectorFiles:
        """Reads those of a local folder or a Hub repository; see [`find_file`]."""
        found = {name: find_file(path, name, **hub_kwargs) for name in (*_COPIED, CARD_NAME)}
        contents = {name: Path(file).read_bytes() for name, file in found.items() if file is not None}
        card = contents.pop(CARD_NAME, b"").decode("utf-8", errors="replace")
        return cls(contents, calibration_of(card), processing_class)

    def write(self, folder: Path) -> None:
        for name, data in self.copied.items():
            with atomic_write(folder / name) as out:
                out.write(data)


def push_selector(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload S2T selector",
    run_as_future: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    """Uploads what belongs to a selector from its local folder to the Hub: [`PUBLISHED`], and nothing else.

    Args:
        folder: the selector's.
        repo_id, private, token, revision, commit_message: as in [`LocalSelector.push_to_hub`].
        run_as_future: upload in the background.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(PUBLISHED),
        ignore_patterns=["checkpoint-*", ".*"],
        revision=revision,
        commit_message=commit_message,
        run_as_future=run_as_future,
    )


def write_custom_generate(folder: Path) -> None:
    """Writes what `generate(custom_generate=REPOSITORY, trust_remote_code=True)` runs."""
    for name, text in _CUSTOM_GENERATE.items():
        with atomic_write(folder / "custom_generate" / name) as out:
            out.write(text.encode("utf-8"))


def guard(folder: str | os.PathLike) -> None:
    """Makes everything but [`LocalSelector`] refuse the local folder of a selector, whose adapter lies in `s2t/`."""
    (Path(folder) / ADAPTER_WEIGHTS_NAME).unlink(missing_ok=True)  # of a version that kept it here
    write_json(Path(folder) / ADAPTER_CONFIG_NAME, _NO_ADAPTER)

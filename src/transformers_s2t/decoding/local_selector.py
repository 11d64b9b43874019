"""S2T-Local: the small model selects by itself, with an adapter and the logits of reserved tokens.

Legend: B rows, A asked rows, K candidates, M appended tokens, T tokens so far, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformers_s2t.config import (
    S2TDecodingConfig,
    SelectorConfig,
)
from transformers_s2t.decoding.selectors import NextStep, Scores, Selector, name_of
from transformers_s2t.files import atomic_write, give_plain_mode
from transformers_s2t.fingerprints import model_hash, same_weights, weights_name
from transformers_s2t.model_checks import (
    check_causal_lm,
    check_reads_in_parts,
    check_without_virtual_tokens,
)
from transformers_s2t.models.forwards import head_is_plain
from transformers_s2t.models.peft_warnings import without_peft_warnings
from transformers_s2t.models.views import (
    ModelViews,
    TokensNotInRows,
    adapted_layers,
    adapter_is_on,
    adapter_state,
    adapters_in,
    merge_adapter,
    plain_view,
    switch_adapter,
    take_out_adapter,
)
from transformers_s2t.proposals import Proposals
from transformers_s2t.reserved_tokens import resize_for_reserved_tokens, vocab_hash
from transformers_s2t.router import Router
from transformers_s2t.scoring.candidates import (
    PrefixCache,
    append_candidates,
    keep_candidate,
    pays_to_merge,
    supports_tree,
)
from transformers_s2t.scoring.reserved_rows import ReservedRows, bin_logits, candidate_scores
from transformers_s2t.selector_card import CARD_NAME, selector_card
from transformers_s2t.selector_files import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS_NAME,
    SelectorFiles,
    find_adapter,
    guard,
    push_selector,
    write_custom_generate,
)


if TYPE_CHECKING:
    from transformers_s2t.decoding.session import S2TSession

ADAPTER_NAME = "s2t"
_PEFT_PREFIX = "base_model.model."  # in the names of an adapter's weights
_TRAINED_ROWS = "trainable_tokens_delta"  # PEFT's name for them, in files as in modules
MAX_CATCH_UP = 512  # tokens that ride along with candidates under one tree mask; longer texts are fed first


class LocalSelector(Selector):
    """S2T-Local: the small model selects by itself, with a LoRA adapter and the logits of reserved tokens.

    Args:
        model: the small model with the adapter in it (a [`PeftModel`], or its base model after PEFT injected it).
        selector_config: [`SelectorConfig`], stored beside the adapter.
        adapter_name: name of the S2T adapter inside the model.
        router: the router that is stored beside the adapter, `None` for none.

    Raises:
        ValueError: where the model holds no trained rows for the reserved tokens, or cannot be scored on a cache
            ([`check_reads_in_parts`]).

    The adapter is left off: `model.generate` without S2T is the base model, token for token. (With
    `proposals="adapted"`, the paper's form, it is left on, because the adapted model writes the text.) Calls with S2T
    run views of the model that share its weights, and change nothing on the model itself: threads may decode with it
    side by side, with and without S2T. The user's own adapters that are active when a call begins take part in its
    writing and scoring.
    """

    appends_candidates = True
    _is_unloaded = False

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        selector_config: SelectorConfig,
        adapter_name: str,
        router: Router | None = None,
    ):
        check_causal_lm("model", model)
        check_without_virtual_tokens("model", model)
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        num_rows = self.model.get_output_embeddings().weight.shape[0]
        if max(selector_config.reserved_token_ids) >= num_rows:
            raise ValueError(
                f"`reserved_token_ids` must be below {num_rows}, the rows of the model's head, got "
                f"{max(selector_config.reserved_token_ids)}."
            )
        self.selector_config = selector_config
        self.adapter_name = adapter_name
        self.thresholds = selector_config.thresholds
        self.fusion = selector_config.fusion
        self.router = router
        self.rows = ReservedRows(self.model, selector_config.reserved_token_ids, adapter_name)
        self.excluded_ids = torch.tensor(selector_config.reserved_token_ids)
        switch_adapter(self.model, adapter_name, self.writes_adapted)
        self.can_split = ModelViews(self.model, adapter_name).can_split
        check_reads_in_parts("model", self.model)
        self.model.save_pretrained = functools.partial(_save_without, self.model, adapter_name)
        self._files = SelectorFiles()
        self._trainable: list[torch.nn.Parameter] = []

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        model: PreTrainedModel | PeftModel,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        adapter_name: str = ADAPTER_NAME,
        allow_other_model: bool = False,
        **hub_kwargs,
    ) -> LocalSelector:
        """Loads an adapter and its `s2t_config.json` into `model`, and the router beside it where there is one.

        Args:
            path: local folder or Hub repository.
            model: the base model that the adapter was trained on; PEFT injects the adapter in place. A model that
                holds this very adapter already is used as it is, and the adapter is switched off for its own text.
            processing_class: the model's tokenizer. It is compared with the one that the labels were made with.
            adapter_name: name inside the model. Loading another adapter under the same name is an error.
            allow_other_model: skip the comparison of the model's weights with those that the adapter was trained on.
            hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder` ... as in `from_pretrained` of transformers.

        Raises:
            FileNotFoundError: where the folder or repository holds no `s2t_config.json`, or no adapter.
            ValueError: where the name is taken, or the adapter was trained for another model or tokenizer.

        Warns:
            UserWarning: where the adapter lies where PEFT and transformers would load it by themselves.
        """
        config = SelectorConfig.from_pretrained(path, **hub_kwargs)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, PreTrainedModel):
            raise TypeError(f"`model` must be a loaded causal language model, got {type(model)}.")
        check_causal_lm("model", model)
        check_without_virtual_tokens("model", model)
        place = find_adapter(path, **hub_kwargs)
        if not place.is_guarded:
            warnings.warn(
                f"The adapter in {str(path)!r} lies where PEFT and transformers load it as an ordinary one, which "
                "ruins the text without an error. `selector.save_pretrained(folder)` writes it where they do not.",
                stacklevel=2,
            )
        _check_fits(base, path, place.weights, config)
        _check_trained_on(base, path, config, allow_other_model)
        if processing_class is not None:
            _check_vocabulary(config, processing_class)
        router = None
        if config.router:  # trained on the same base model, which was compared above
            router = Router.from_pretrained(path, base, expected=config.router, allow_other_model=True, **hub_kwargs)
        files = SelectorFiles.read(path, processing_class, **hub_kwargs)
        if held := _held_as(base, place.weights):
            selector = cls(base, config, held, router)
            selector._files = files
            return selector
        if adapter_name in _adapter_names(model, base):
            raise ValueError(
                f"`model` already holds an adapter named {adapter_name!r}; pass another `adapter_name` or a new model."
            )
        state, training = adapter_state(base), base.training
        trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
        resize_for_reserved_tokens(base, max(config.reserved_token_ids) + 1)
        try:
            try:
                with without_peft_warnings():
                    if isinstance(model, PeftModel):
                        model.load_adapter(str(place.folder), adapter_name=adapter_name)
                    else:
                        model = PeftModel.from_pretrained(model, str(place.folder), adapter_name=adapter_name)
                model.train(training)
            finally:
                switch_adapter(base, adapter_name, False, state)
        except BaseException:  # off also where it is half loaded; an interrupt may have hit the line above
            switch_adapter(base, adapter_name, False, state)
            raise
        selector = cls(model, config, adapter_name, router)
        selector._files, selector._trainable = files, trainable
        return selector

    def unload(self) -> PreTrainedModel:
        """Takes the adapter out of the model, and returns the model as it was before. The selector is of no use then.

        Embeddings and head keep rows that were added for reserved tokens; text never shows them.

        Raises:
            ValueError: where the adapter is merged into the weights.
        """
        take_out_adapter(self.model, self.adapter_name)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        configs = getattr(self.model, "peft_config", {})
        configs.pop(self.adapter_name, None)
        if not configs and hasattr(self.model, "peft_config"):
            del self.model.peft_config
            self.model._hf_peft_config_loaded = False
        self.model.__dict__.pop("save_pretrained", None)
        self._is_unloaded = True
        return self.model

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        include_base: bool = False,
        processing_class: PreTrainedTokenizerBase | None = None,
        **card: Any,
    ) -> Path:
        """Writes the selector into a folder that [`from_pretrained`] reads and everything else refuses.

        Thresholds and fusion weights are written as they are now; router, calibration, tokenizer and the ids of seen
        problems as they were loaded.

        Args:
            folder: made where need be.
            include_base: write the base model too, as a checkpoint that any program loads and that writes the base
                model's text, and, with `trust_remote_code=True`, selects.
            processing_class: the tokenizer to write, by default the one that was loaded.
            card: arguments of [`selector_card`]: `license`, `language`, `tags`, `datasets`.

        Returns:
            The folder.

        Raises:
            ValueError: where the adapter is merged, or `include_base` would not write the base model.
        """
        return self._write(Path(folder), Path(folder).resolve().name, include_base, processing_class, card)

    def _write(
        self,
        folder: Path,
        repository: str,
        include_base: bool,
        processing_class: PreTrainedTokenizerBase | None,
        card: dict[str, Any],
    ) -> Path:
        if self._is_unloaded or (self.writes_adapted and not adapted_layers(self.model, self.adapter_name)):
            raise ValueError("The adapter is no longer in the model (`merge` or `unload` took it out): load it again.")
        tokenizer = processing_class or self._files.processing_class
        peft_config = copy.deepcopy(self.model.peft_config[self.adapter_name])
        peft_config.inference_mode = True
        if isinstance(peft_config.target_modules, set):  # whose order would change from one process to the next
            peft_config.target_modules = sorted(peft_config.target_modules)
        state = get_peft_model_state_dict(self.model, adapter_name=self.adapter_name, save_embedding_layers=False)
        state = {f"{_PEFT_PREFIX}{name}": tensor.contiguous().cpu() for name, tensor in state.items()}
        if include_base:
            self.model.save_pretrained(folder)
            give_plain_mode(folder)
        adapter = folder / ADAPTER_FOLDER
        with atomic_write(adapter / ADAPTER_WEIGHTS_NAME) as out:
            out.write(save(state, metadata={"format": "pt"}))
        peft_config.save_pretrained(str(adapter))
        router = self.selector_config.router if self.router is None else self.router.save_pretrained(folder)
        config = replace(self.selector_config, thresholds=self.thresholds, fusion=self.fusion, router=router)
        self._files.write(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_custom_generate(folder)
        if not include_base:
            guard(folder)
        config.save_pretrained(folder)
        card = {"calibration": self._files.calibration, "include_base": include_base} | card
        (folder / CARD_NAME).write_text(selector_card(config, repository, **card), encoding="utf-8")
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload S2T selector",
        include_base: bool = False,
        processing_class: PreTrainedTokenizerBase | None = None,
        **card: Any,
    ) -> CommitInfo:
        """Uploads what [`save_pretrained`] writes to the Hub, and nothing else.

        Args:
            repo_id: "you/name"; made where there is none.
            private: whether a new repository is private; `None` for the organization's default.
            token: Hub token with write access; `None` for the one that `hf auth login` stored.
            revision: branch.
            commit_message: message of the upload's commit.
            include_base, processing_class, card: as in [`save_pretrained`].

        Raises:
            ValueError: as [`save_pretrained`].
            HfHubHTTPError: where the Hub refuses.
        """
        settings = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), repo_id, include_base, processing_class, card)
            return push_selector(folder, repo_id, **settings)

    def merge(self) -> LocalSelector:
        """Merges the adapter into the model, so that a step costs what it costs without one. Returns the selector.

        Only for `proposals="adapted"`, where every token sees the adapter anyway; the reserved rows are not merged. It
        cannot be undone. In 16-bit weights the sum is rounded, and scores differ by that.

        Raises:
            ValueError: where the base model is needed, or merging would not be exact (quantized weights, DoRA, another
                adapter in the same layers).
        """
        if not self.writes_adapted:
            raise ValueError(
                f"Merging takes `proposals='adapted'`, got {self.selector_config.proposals!r}: the base model writes "
                "the text."
            )
        merge_adapter(self.model, self.adapter_name)
        return self

    @property
    def config(self) -> S2TDecodingConfig:
        names = ("num_candidates", "min_prob_ratio", "warmup_tokens")
        deployed = self.selector_config.decoding or S2TDecodingConfig()
        open_fields = [name for name in names if getattr(deployed, name) is None]
        return replace(deployed, **{name: getattr(self.selector_config, name) for name in open_fields})

    def check_tokenizer(self, processing_class: PreTrainedTokenizerBase) -> None:
        _check_vocabulary(self.selector_config, processing_class)

    @property
    def shares_the_cache(self) -> bool:
        """Whether `s2t_generate` scores on the cache that it decodes with: the text is written as it is scored."""
        return (self.selector_config.adapter_scope == "sequence") == self.writes_adapted

    @property
    def writes_adapted(self) -> bool:
        """Whether the adapted model writes the text (`proposals="adapted"`, the paper's form)."""
        return self.selector_config.proposals == "adapted"

    def check_model(self, model: PreTrainedModel | None) -> None:
        if model is not None and model is not self.model:
            return  # another one writes: nothing is known of it
        is_on = adapter_is_on(self.model, self.adapter_name)
        if is_on and not self.writes_adapted:
            raise ValueError(
                f"The S2T adapter {self.adapter_name!r} is switched on for the text itself, which the base model is "
                "to write (proposals='base'): call `set_adapter` with your own adapter's name, load the selector "
                "again, or use s2t_generate, which leaves it out."
            )
        if self.writes_adapted and not is_on and adapted_layers(self.model, self.adapter_name):
            raise ValueError(
                f"The S2T adapter {self.adapter_name!r} is switched off, but is to write the text "
                f"(proposals='adapted'): call `set_adapter({self.adapter_name!r})`, or use s2t_generate, which adds "
                "it."
            )

    def views(
        self,
        model: PreTrainedModel | None = None,
        watches: Mapping[int, Callable[[torch.Tensor], None]] | None = None,
    ) -> ModelViews:
        if self._is_unloaded:
            raise ValueError("This selector's adapter was taken out of the model (`unload`): load it again.")
        return ModelViews(self.model, self.adapter_name, watches)

    def writer(self, views: ModelViews) -> PreTrainedModel:
        return views.adapted if self.writes_adapted else views.base

    def reader(self, views: ModelViews) -> PreTrainedModel:
        return views.adapted if self.selector_config.adapter_scope == "sequence" else views.base

    def read_scores(self, hidden_AKD: torch.Tensor) -> torch.Tensor:
        """Scores (A, K) from the candidates' last hidden states."""
        return candidate_scores(bin_logits(hidden_AKD, self.rows()), self.selector_config.score_head)

    def score(self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals) -> Scores:
        """Scores in one forward where a tree mask is exact and cheaper, otherwise in two; the scores are the same.

        - The driving call's own cache holds the prefix: one forward ("tree") scores and decodes the candidates.
        - The prefix has a cache of its own: one forward ("scorer") reads its new tokens and scores the candidates.
        """
        in_sequence = self.selector_config.adapter_scope == "sequence"
        prefix, num_new = session.student_prefix(self)
        batch_size, (num_asked, width) = session.mask_BT.shape[0], proposals.ids_BK.shape
        if (in_sequence or self.can_split) and supports_tree(self.model, prefix.cache):
            try:
                if num_new == 0 and session.student_cache is not None:
                    copies = width if in_sequence else 2 * width
                    if pays_to_merge(batch_size * (copies - 1) - num_asked * width, self.model.device):
                        return self._score_and_decode(session, rows_A, proposals, prefix)
                elif 0 < num_new <= MAX_CATCH_UP and (prefix.num_cached or session.is_bare_text):
                    # (padding would be new tokens that see nothing: NaN)
                    if pays_to_merge((batch_size - num_asked) * width, self.model.device):
                        return Scores(self._catch_up_and_score(session, rows_A, proposals, prefix, num_new))
            except TokensNotInRows:
                self.can_split = False
        if num_new:
            session.count_forward("scorer", num_new * batch_size)
            prefix.feed(session.input_ids_BT, session.mask_BT)
        return Scores(self._score_alone(session, rows_A, proposals, prefix))

    def _score_alone(
        self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals, prefix: PrefixCache
    ) -> torch.Tensor:
        """Scores (A, K) by a forward over the candidates of the asked rows, on a fork of the cached prefix."""
        device = self.model.device
        mask_AT, ids_AK = session.mask_BT[rows_A].to(device), proposals.ids_BK.to(device)
        whole_batch = len(rows_A) == session.mask_BT.shape[0]
        session.count_forward("scorer", ids_AK.numel())
        appended = append_candidates(
            session.views.adapted,
            prefix.cache,
            mask_AT,
            ids_AK,
            row_index=None if whole_batch else rows_A.to(device),
        )
        return self.read_scores(appended.hidden_BMD).to(proposals.logprobs_BK.device)

    def _catch_up_and_score(
        self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals, prefix: PrefixCache, num_new: int
    ) -> torch.Tensor:
        """Scores (A, K) by one forward that also feeds the last `num_new` tokens of the text to the prefix's cache."""
        width = proposals.ids_BK.shape[1]
        ids_BK = session.input_ids_BT[:, -1:].repeat(1, width)  # rows that were not asked: any token will do
        ids_BK[rows_A] = proposals.ids_BK
        in_sequence = self.selector_config.adapter_scope == "sequence"
        model = session.views.adapted if in_sequence else session.views.on_tokens(slice(-width, None))
        hidden_BKD = prefix.feed_and_append(model, session.input_ids_BT, session.mask_BT, ids_BK)
        session.count_forward("scorer", len(ids_BK) * (num_new + width))
        return self.read_scores(hidden_BKD[rows_A.to(hidden_BKD.device)]).to(proposals.logprobs_BK.device)

    def _score_and_decode(
        self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals, prefix: PrefixCache
    ) -> Scores:
        """The tree step: one forward scores the candidates and is the next decoding step of the whole batch.

        With adapter scope "candidate" every candidate is run twice: with the adapter, to score it, and without, as the
        base model's next token. Rows that were not asked run their own token in every column.
        """
        width = proposals.ids_BK.shape[1]
        ids_BK = session.default_B[:, None].repeat(1, width)
        ids_BK[rows_A] = proposals.ids_BK
        twice = self.selector_config.adapter_scope == "candidate"
        ids_BM = torch.cat([ids_BK, ids_BK], dim=1) if twice else ids_BK
        appended = append_candidates(
            session.views.on_tokens(slice(0, width)) if twice else session.views.adapted,
            prefix.cache,
            session.mask_BT,
            ids_BM,
            tree=True,
            num_logits=0 if session.head_is_plain else width,
        )
        session.count_forward("tree", ids_BM.numel())
        states_BKD = None if session.router is None else session.hidden.take()[:, -width:]
        written_BKD = appended.hidden_BMD[:, -width:]
        if session.head_is_plain is None:  # if it is, the head is applied to the chosen candidates alone
            session.head_is_plain = head_is_plain(self.model, written_BKD, appended.logits_BLV)

        def advance(choice_A: torch.Tensor) -> NextStep:
            chosen_B = torch.zeros(len(ids_BM), dtype=torch.long, device=ids_BM.device)
            chosen_B[rows_A] = choice_A
            kept = keep_candidate(appended.fed, chosen_B + (width if twice else 0), ids_BM.shape[1], tree=True)
            for layer, new in zip(prefix.cache.layers, kept.layers):
                layer.__dict__.update(new.__dict__)
            rows_B = torch.arange(len(ids_BM), device=ids_BM.device)

            def of_chosen(values_BKX: torch.Tensor) -> torch.Tensor:
                device = values_BKX.device
                return values_BKX[rows_B.to(device), chosen_B.to(device)]

            states_BD = None if states_BKD is None else of_chosen(states_BKD)
            if appended.logits_BLV is not None:
                return NextStep(of_chosen(appended.logits_BLV).to(ids_BM.device).float(), states_BD)
            logits_BV = self.model.get_output_embeddings()(of_chosen(written_BKD))
            return NextStep(logits_BV.to(ids_BM.device).float(), states_BD)

        hidden_AKD = appended.hidden_BMD[rows_A.to(appended.hidden_BMD.device), :width]
        return Scores(self.read_scores(hidden_AKD).to(ids_BM.device), advance)


def _save_without(model: PreTrainedModel, adapter_name: str, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """`model.save_pretrained` while the adapter is in it: a checkpoint of the base model, without the adapter.

    Raises:
        ValueError: see [`plain_view`].
    """
    held = {name for module in model.modules() if isinstance(module, BaseTunerLayer) for name in adapters_in(module)}
    if held - {adapter_name} and getattr(model, "_hf_peft_config_loaded", False):  # writes the active one alone
        return type(model).save_pretrained(model, save_directory, **kwargs)
    plain = plain_view(model, adapter_name)
    plain._hf_peft_config_loaded = False
    return type(model).save_pretrained(plain, save_directory, **kwargs)


def _check_fits(base: PreTrainedModel, path: str | os.PathLike, weights: str, config: SelectorConfig) -> None:
    """Compares the stored shapes with the model's, before anything is injected.

    Raises:
        ValueError: where the adapter was trained on a model of another hidden size, depth or vocabulary.
    """
    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
        sizes = [file.get_slice(n).get_shape()[1] for n in names if n.endswith(_TRAINED_ROWS)]
    depths = [int(match.group(1)) for name in names if (match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))]
    num_rows, hidden_size = base.get_output_embeddings().weight.shape
    depth = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    beyond = sorted(id for id in config.reserved_token_ids if id >= num_rows)  # all, where training added the rows
    wrong = None
    if sizes and sizes[0] != hidden_size:
        wrong = f"hidden_size={sizes[0]}, but `model` has {hidden_size}"
    elif depths and depth is not None and max(depths) >= depth:
        wrong = f"{max(depths) + 1} or more layers, but `model` has {depth}"
    elif beyond and (len(beyond) < len(config.reserved_token_ids) or (not config.model_hash and beyond[0] > num_rows)):
        wrong = f"reserved token ids up to {beyond[-1]}, but the head of `model` has {num_rows} rows"
    if wrong:
        raise ValueError(
            f"The adapter {str(path)!r} was trained on a model with {wrong}: load the one it was trained on."
        )


def _check_trained_on(
    base: PreTrainedModel,
    path: str | os.PathLike,
    config: SelectorConfig,
    allow_other_model: bool,
) -> None:
    """Raises a ValueError where the adapter was trained on other weights.

    An adapter of another model with the same shapes would load, and its scores would be random.
    """
    if allow_other_model or not config.model_hash:
        return
    found = model_hash(base)
    if not same_weights(config.model_hash, found):
        raise ValueError(
            f"The adapter {str(path)!r} was trained on {config.base_model!r} (weights "
            f"{weights_name(config.model_hash)}), but `model` ({name_of(base)!r}) has weights {weights_name(found)}: "
            "load the one it was trained on, or pass `allow_other_model=True`."
        )


def _check_vocabulary(config: SelectorConfig, processing_class: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError where the labels were made with another tokenizer."""
    if config.vocab_hash and vocab_hash(processing_class) != config.vocab_hash:
        raise ValueError(
            f"The adapter was trained with the tokenizer of {config.base_model!r} (vocabulary {config.vocab_hash}), "
            f"but `processing_class` has {vocab_hash(processing_class)}."
        )


def _held_as(base: PreTrainedModel, weights: str) -> str | None:
    """The name under which a model holds this adapter already, recognised by its trained rows; `None` for none."""
    with safe_open(weights, framework="pt") as file:
        stored = [file.get_tensor(name) for name in file.keys() if name.endswith(_TRAINED_ROWS)]
    for module in base.modules():
        for name, rows_RD in getattr(module, _TRAINED_ROWS, {}).items():
            if stored and rows_RD.shape == stored[0].shape:
                if torch.equal(rows_RD.detach().cpu(), stored[0].to(rows_RD.dtype)):
                    return name
    return None


def _adapter_names(model: PreTrainedModel | PeftModel, base: PreTrainedModel) -> set[str]:
    names = set(model.peft_config) if isinstance(model, PeftModel) else set(getattr(base, "peft_config", {}))
    for module in base.modules():
        names |= set(getattr(module, "lora_A", {}))
    return names

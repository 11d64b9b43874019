"""The tokenizer of the embedded pair: a closed vocabulary, one token per digit, verbatim decoding.

Words carry the space in front of them (` apples`), digits do not (`27` behind a word is ` `, `2`, `7`). BOS is put in
front of everything that is encoded; EOS ends a solution and is written by the training script. There is no chat
template. The 16 reserved tokens never occur in a corpus; they are there for a selector to read scores from.
"""

import corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


BOS, EOS, PAD, UNK = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|unknown|>"
NUM_RESERVED_TOKENS = 16
RESERVED_TOKENS = [f"<|reserved_special_token_{i}|>" for i in range(NUM_RESERVED_TOKENS)]
MAX_LENGTH = 256

SYMBOLS = (*"0123456789", " ", "\n", ".", ",", "?", "+", "-", "*", "=", "####")
WORDS = (
    (*corpus.ADD_VERBS, *corpus.SUB_VERBS, "has", "takes", "from", "more", "fewer", "than", "twice", "as", "many")
    + ("dozen", "for", "weeks", "one", "a", "day", "How", "does", "have")
)  # fmt: skip
PIECES = r" ?[A-Za-z]+|####|[0-9]|[^A-Za-z0-9]"


def build_vocabulary() -> list[str]:
    """All tokens, the id being the position."""
    spaced = [f" {word}" for word in (*corpus.NAMES, *corpus.NOUNS, *WORDS)]
    return [BOS, EOS, PAD, UNK, *SYMBOLS, *corpus.CONNECTORS, *corpus.NAMES, *spaced, *RESERVED_TOKENS]


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokens = build_vocabulary()
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokens.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=RESERVED_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )

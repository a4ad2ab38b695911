"""Classifiers of texts: pretrained ones with a head, or small new ones, and what of them is
trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from nso_hf.refusal import check_integer, refusal
from nso_hf.tasks.pretrained import PretrainedOptions, load_pretrained, with_adapters

NEW = {"bert-tiny": (2, 128), "bert-mini": (4, 256)}
"""Models that begin from nothing -> layers and width, as of arXiv 1908.08962."""

_HEAD_WIDTH = 64
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@dataclass
class ModelOptions(PretrainedOptions):
    model_name_or_path: str = field(
        default="bert-tiny",
        metadata={
            "help": "bert-tiny or bert-mini: new, with a vocabulary of the training texts; or hub "
            "id or folder of a pretrained model (BERT, GPT-2, Llama, T5, ...). 'package:NAME' or "
            "'package:NAME/FOLDER' is the folder of an installed Python package that carries one."
        },
    )
    vocabulary_size: int = field(
        default=4096, metadata={"help": "Most pieces of words that a new model tells apart."}
    )
    linear_probe: bool = field(
        default=False, metadata={"help": "Train the head alone, on what the model gives it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("vocabulary_size", self.vocabulary_size, 100, "Typical: 4096 to 30000")
        if self.lora_r is not None and self.linear_probe:
            rule = "trains the head alone, and lora_r adapters too"
            raise refusal("linear_probe", True, rule, "Leave one of them out")
        for option, what in {"lora_r": "adapt", "gguf_file": "load"}.items():
            if getattr(self, option) is not None and self.is_new:
                rule = f"{self.model_name_or_path} is new: there is nothing to {what}"
                cure = "Leave it out, or name a pretrained model"
                raise refusal(option, getattr(self, option), rule, cure)

    @property
    def is_new(self) -> bool:
        return self.model_name_or_path in NEW

    def load(
        self, classes: Sequence[str], texts: Iterator[str]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The classifier, all of it trainable, and its tokenizer. The head is new but where the
        model has one of as many classes.

        Args:
            texts: those of training, of which new models get their vocabulary.
        """
        labels: dict[str, Any] = {
            "id2label": dict(enumerate(classes)),
            "label2id": {label: number for number, label in enumerate(classes)},
        }
        if self.is_new:
            layers, width = NEW[self.model_name_or_path]
            tokenizer = word_pieces(texts, self.vocabulary_size)
            config = BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // _HEAD_WIDTH,
                pad_token_id=tokenizer.pad_token_id,
                **labels,
            )
            new: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
            return _with_mean_loss(new), tokenizer
        model, loaded = load_pretrained(
            self,
            lambda config: AutoModelForSequenceClassification,
            ignore_mismatched_sizes=True,  # of the head
            **labels,
        )
        _set_padding(model, loaded, self.model_name_or_path)
        return _with_mean_loss(model), loaded

    def trainable(self, model: PreTrainedModel) -> Any:
        """The model of which the weights are trained that the options say."""
        head = head_of(model)
        if not head and (self.linear_probe or self.lora_r is not None):
            option = "linear_probe" if self.linear_probe else "lora_r"
            rule = f"a {type(model).__name__} has no head apart from the rest"
            raise refusal(option, getattr(self, option), rule, "Leave it out")
        if self.lora_r is not None:
            from peft import TaskType

            return with_adapters(model, self, TaskType.SEQ_CLS, head=head)
        if self.linear_probe:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.split(".")[0] in head)
        return model


def _with_mean_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Most of these models take `num_items_in_batch`, do not divide by it, and return the mean of
    their micro-batch; the Trainer would add up these means over micro-batches and processes."""
    untyped: Any = model
    untyped.accepts_loss_kwargs = False
    return model


def head_of(model: PreTrainedModel) -> list[str]:
    """The names of the modules that make classes of what the model proper gives."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def word_pieces(texts: Iterator[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most so many pieces of words, lower case, that are frequent in texts (BPE,
    arXiv 1508.07909); the same for the same texts, which BERT's WordPiece is not: its trainer
    numbers what goes on within a word in the order of a hash."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = list(_SPECIAL.values())
    trainer = BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=names, model_max_length=512, **_SPECIAL
    )


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Pad with the token that the model, too, takes for padding: models that only decode classify
    the last token before it."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            rule = "its tokenizer has neither a token to pad with nor one that ends a text"
            cure = "Add one to the tokenizer's configuration"
            raise refusal("model_name_or_path", name, rule, cure)
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model has places for, if it says so."""
    for name, module in model.named_modules():
        numbers_from_padding = getattr(module, "padding_idx", None) is not None
        if name.endswith("position_embeddings") and numbers_from_padding:  # as RoBERTa
            assert isinstance(module, nn.Embedding) and module.padding_idx is not None
            return module.num_embeddings - module.padding_idx - 1
    return getattr(model.config, "max_position_embeddings", None)

"""Objectives that predict words: masked ones, the next one, displaced ones."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig

from oneday.arguments import BudgetTrainingArguments
from oneday.collators import CausalCollator, Collator, MaskedCollator, WordOrderCollator
from oneday.errors import SettingError
from oneday.modeling import model_kind
from oneday.objectives.base import EVALUATION_SEED, STANDARD_MLM_PROBABILITY, Objective

# What a run of shuffled tokens leaves out of a row: [CLS], [SEP] and one masked token.
NEVER_SHUFFLED = 3


class MaskedLanguageModeling(Objective):
    """`mlm`: tokens are hidden and predicted from both sides (Devlin et al. 2019, arXiv 1810.04805)."""

    name, kind, auto_class, needs_mask = "mlm", "encoder", AutoModelForMaskedLM, True
    pipeline, has_stock_loss = "fill-mask", True
    collator_class = MaskedCollator

    def mask_settings(self) -> dict[str, object]:
        """The collator's settings beyond the rate.

        Raises:
            SettingError: When one cannot work.
        """
        if self.args.mask_replacement not in ("mask", "bert"):
            raise SettingError(
                f"The setting mask_replacement is {self.args.mask_replacement!r}; it must be mask or bert."
            )
        return {"replacement": self.args.mask_replacement, "whole_words": self.args.whole_word_mask}

    def training_collator(self, position_offset: int) -> Collator:
        """Masks at the rate and with the replacement that the settings say."""
        self.check_fraction("mlm_probability", "mlm_probability_end")
        rates = (self.args.mlm_probability, self.args.mlm_probability_end)
        return self.collator_class(self.tokenizer, self.args.seed, position_offset, *rates, **self.mask_settings())

    def evaluation_collators(self, position_offset: int) -> dict[str, Collator]:
        """`eval_loss` at the run's final rate, and `eval_mlm_loss` at 15 % all-mask, which objectives share."""
        args = self.args
        rate = args.mlm_probability if args.mlm_probability_end is None else args.mlm_probability_end
        common = (self.tokenizer, EVALUATION_SEED, position_offset)
        return {
            "eval_loss": self.collator_class(*common, rate, None, **self.mask_settings()),
            "eval_mlm_loss": MaskedCollator(*common, STANDARD_MLM_PROBABILITY),
        }


class WordOrder(MaskedLanguageModeling):
    """`word_order`: masked words, and the original order of shuffled ones.

    Short runs of tokens that are not masked are shuffled, and the model says at each of their places what stood there
    (the word structural objective of Wang et al. 2019, "StructBERT", arXiv 1908.04577). The loss is the mean over
    masked and shuffled places alike.
    """

    name = "word_order"
    collator_class = WordOrderCollator

    @classmethod
    def check_rows(cls, args: BudgetTrainingArguments, row_length: int) -> None:
        """See Objective: without room for a run it would be `mlm` under another name."""
        if args.word_order_span > row_length - NEVER_SHUFFLED:
            raise SettingError(
                f"The setting word_order_span is {args.word_order_span}, and the shortest rows of {row_length} tokens "
                f"have {row_length - NEVER_SHUFFLED} beside the special and masked ones; lower it, or raise "
                f"{'max_seq_length' if args.max_seq_length_start is None else 'max_seq_length_start'}."
            )

    def mask_settings(self) -> dict[str, object]:
        """As for `mlm`, and what is shuffled."""
        self.check_fraction("word_order_probability")
        if self.args.word_order_span < 2:
            raise SettingError(f"The setting word_order_span is {self.args.word_order_span}; it must be 2 or more.")
        return {
            **super().mask_settings(),
            "order_probability": self.args.word_order_probability,
            "span": self.args.word_order_span,
        }


class CausalLanguageModeling(Objective):
    """`clm`: each token is predicted from those before it in its document."""

    name, kind, auto_class = "clm", "decoder", AutoModelForCausalLM
    pipeline, has_stock_loss = "text-generation", True

    def find_class(self, config: PreTrainedConfig) -> type:
        """Of a decoder: BERT has a causal class too, whose attention still sees what it is to predict.

        Raises:
            SettingError: The config is an encoder's.
        """
        if type(config) in self.auto_class._model_mapping and model_kind(config) == "encoder":
            hint = "set is_decoder to true in it, or take" if hasattr(config, "is_decoder") else "take"
            raise SettingError(
                f"model_config: {config.model_type} is an encoder, whose tokens see the ones that objective clm "
                f"predicts; {hint} a decoder, say model_configs/qwen3-mini.json."
            )
        return super().find_class(config)

    def training_collator(self, position_offset: int) -> Collator:
        """Every token of a document but its first, and its end."""
        return CausalCollator(self.tokenizer, self.args.seed, position_offset, self.tokenizer.eos_token_id)

    def evaluation_collators(self, position_offset: int) -> dict[str, Collator]:
        """`eval_loss`: nats a predicted token of the text; ends of documents are none."""
        return {"eval_loss": CausalCollator(self.tokenizer, EVALUATION_SEED, position_offset)}

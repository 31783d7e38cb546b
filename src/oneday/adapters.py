"""Fine-tuning a part of the weights: LoRA adapters beside frozen ones, or the head alone.

One structural rule stands for a table of architectures, which peft has for some only: every linear layer of the
encoder or decoder gets an adapter, and what is new for the task (the head, a pooler) is trained whole. LoRA: Hu et al.
2021, arXiv 2106.09685; on all layers: Dettmers et al. 2023, arXiv 2305.14314 (which also has the 4-bit base); DoRA:
Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from oneday.errors import SettingError, describe_error
from oneday.glue_protocol import PROBE, FinetuneArguments, choose_device

logger = logging.getLogger(__name__)


def restrict_training(model: PreTrainedModel, args: FinetuneArguments) -> PreTrainedModel | PeftModel:
    """The model with what `peft` and `protocol` leave to train: everything, adapters and head, or the head.

    Raises:
        SettingError: When the architecture's layers cannot be held in 4 bits, or bitsandbytes cannot.
    """
    if args.protocol == PROBE:
        head = tuple(f"{name}." for name in find_head(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(head))
    return model if args.peft is None else add_adapters(model, args)


def find_head(model: PreTrainedModel) -> list[str]:
    """Names of the modules that are there for the task: those outside the encoder or decoder, and its pooler.

    A masked-LM checkpoint has no pooler, so that `bert.pooler` would stay random where it is frozen.
    """
    base = model.base_model_prefix
    head = [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]
    return head + [f"{base}.pooler"] * (getattr(model.base_model, "pooler", None) is not None)


def find_linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of the encoder or decoder, without its pooler.

    XLNet holds its attention in bare parameters: there only the feed-forward layers are found.
    """
    head = tuple(find_head(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not name.startswith(head)
    ]


def add_adapters(model: PreTrainedModel, args: FinetuneArguments) -> PeftModel:
    """Freeze the model, put an adapter on each linear layer, and leave the head to train."""
    layers = find_linear_layers(model)
    if args.peft == "qlora":
        quantize_layers(model, layers, choose_device(args))
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.dropout or 0.0,
        target_modules=layers,
        modules_to_save=find_head(model),
        use_dora=args.peft == "dora",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    local = Path(args.model_name_or_path)
    # peft writes it beside the adapter, which is loaded from anywhere.
    model.name_or_path = str(local.resolve()) if local.is_dir() else args.model_name_or_path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for an attribute that transformers renames
        try:
            return peft.get_peft_model(model, config)
        except Exception as error:  # of an architecture whose layers it does not know
            raise SettingError(
                f"peft is {args.peft!r}, which cannot be added to a {model.config.model_type} model "
                f"({describe_error(error)}); leave it out."
            ) from None


def quantize_layers(model: PreTrainedModel, layers: list[str], device: torch.device) -> None:
    """Hold the named layers in 4 bits (NF4), in place; bitsandbytes packs them on their way to the device."""
    if any(isinstance(model.get_submodule(name), Conv1D) for name in layers):
        raise SettingError(
            f"peft is 'qlora', and bitsandbytes has no 4-bit form of the layers of a {model.config.model_type} model; "
            "take lora."
        )
    try:
        # Lazily: it prints on a CPU.
        from bitsandbytes.nn import Linear4bit, Params4bit
    except (ImportError, RuntimeError) as error:
        raise SettingError(
            f"peft is 'qlora', and bitsandbytes cannot be used ({describe_error(error)}); take lora."
        ) from None
    for name in layers:
        old = model.get_submodule(name)
        # Its kernel for CPUs (0.50.2) reads such weights back a quarter off, and says nothing.
        if device.type == "cpu" and old.in_features % 64:
            raise SettingError(
                f"peft is 'qlora', and bitsandbytes has no sound 4-bit form on a CPU of the {old.in_features} inputs "
                f"of {name}, which are no multiple of 64; take lora."
            )
        new = Linear4bit(old.in_features, old.out_features, old.bias is not None, torch.bfloat16, quant_type="nf4")
        new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        # Packing for a kernel from the Hub, on CPUs with bf16 units; it fails where outputs are no multiple of 32.
        new.support_avx512bf16_for_cpu = False
        new.bias = old.bias
        model.set_submodule(name, new.to(device))
    model.is_loaded_in_4bit = True  # by this peft chooses its 4-bit layer


def count_trained(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: `trainable_parameters`, `total_parameters` (adapters too; 4-bit weights unpacked)."""
    # peft keeps a frozen copy of each head beside the trained one.
    kept = [(name, value) for name, value in model.named_parameters() if ".original_module." not in name]
    total = sum(value.numel() * (2 if value.dtype == torch.uint8 else 1) for _, value in kept)
    return {
        "trainable_parameters": sum(value.numel() for _, value in kept if value.requires_grad),
        "total_parameters": total,
    }


def save_classifier(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool, max_length: int
) -> None:
    """Save a fine-tuned model with its tokenizer: whole, or an adapter; `merge` adds the adapter to the weights first.

    The tokenizer truncates at `max_length` tokens, where the training did.

    A merged model loads with `AutoModelForSequenceClassification`, an adapter with peft's
    `AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=...)`.
    """
    if merge and isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)

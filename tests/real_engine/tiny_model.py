"""Makes a tiny Qwen2 checkpoint to serve: random weights, own tokenizer, chat template."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Final

VOCAB_SIZE: Final = 512
# More than the servers are started with: a limit that a test runs into is then the server's.
MAX_POSITION_EMBEDDINGS: Final = 512
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COMPLETE = "complete"


def _corpus(seed: int) -> list[str]:
    """Sentences of made-up words: enough of them that the trainer fills the vocabulary."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=12)) + "." for _ in range(200)]


def make_tiny_model(directory: Path, seed: int = 0) -> Path:
    """Writes model and tokenizer into `directory`, the same bytes for the same seed. A finished one stays."""
    # Imported here: the fixtures are collected in environments without torch too.
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    marker = directory / _COMPLETE
    if marker.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, expected {VOCAB_SIZE}")
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call,unused-ignore]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_POSITION_EMBEDDINGS,
    )
    wrapped.chat_template = CHAT_TEMPLATE

    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        # Head size 64: vLLM's CPU attention refuses 16, and the engine dies at the first request.
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITION_EMBEDDINGS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    # fork_rng: a fixture must not change the random state of the tests that use it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).bfloat16()
    model.save_pretrained(directory)
    wrapped.save_pretrained(directory)
    marker.write_text(f"seed {seed}\n")
    return directory


def main() -> None:
    """Command line: tiny_model.py DIRECTORY [--seed N]."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_tiny_model(arguments.directory, arguments.seed))


if __name__ == "__main__":
    main()

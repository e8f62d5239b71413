"""Write examples/models/tiny: a small Llama and its tokenizer, for examples/finetune_hf.yaml.

It is made here, and taught a little Python for half a minute, so that the example needs no download. A real model is
named in its place: a folder, or a name on the hub. Needs the extra: pip install '.[hf]'.

    python examples/finetune_model.py
"""

import sysconfig
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

DOCS = Path(__file__).parents[1] / "docs"
SOURCES = Path(sysconfig.get_paths()["stdlib"])
BATCH, CONTEXT = 16, 65


def main(path: Path, steps: int, num_files: int) -> None:
    """Make both, and train the model on some files of Python's standard library."""
    sources = [source.read_text(errors="replace") for source in sorted(SOURCES.glob("*.py"))[:num_files]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sources, *(page.read_text() for page in sorted(DOCS.glob("*.md")))], trainer)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251 - a script of its own, in which nobody else draws
        model = transformers.LlamaForCausalLM(config)
        train(model, torch.tensor(tokenizer.encode("".join(sources)).ids), steps)
    model.save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    print(f"{path}: {model.num_parameters():,} parameters, {tokenizer.get_vocab_size()} tokens")


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> None:
    """Plain training, on one process."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.2f}")


if __name__ == "__main__":
    main(Path(__file__).parent / "models" / "tiny", steps=300, num_files=60)

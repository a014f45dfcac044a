"""From a small pretrained model to one that answers: `python examples/finetune.py`, half a minute on the CPU.

Makes the model and its tokenizer (yours come from a download), writes chats, and shows the commands that it runs.
"""

import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

FOLDER = Path("runs/finetune_example")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Japan": "Tokyo", "Peru": "Lima"}


def make_pretrained(folder: Path) -> None:
    """Save a tokenizer trained on Python's own sources, with a chat template, and an untrained Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    bpe.train([str(source) for source in sources], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_chats(file: Path) -> None:
    """Write one example per line; the loss is on the answers of the assistant."""
    draw = random.Random(0)
    with file.open("w") as out:
        for _ in range(200):
            country = draw.choice(sorted(CAPITALS))
            chat = [
                {"role": "user", "content": f"What is the capital of {country}?"},
                {"role": "assistant", "content": f"{CAPITALS[country]}."},
            ]
            out.write(json.dumps({"messages": chat}) + "\n")


def run(*words: str) -> None:
    print("$ python", shlex.join(words), flush=True)
    subprocess.run([sys.executable, *words], check=True)


def answer(folder: Path, question: str) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**tokens, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    base, chats = FOLDER / "base", FOLDER / "chats.jsonl"
    make_pretrained(base)
    write_chats(chats)
    common = ["experiment=finetune", f"model.path={base}", f"data.path={chats}", f"data.cache_dir={FOLDER / 'cache'}"]
    short = ["train.steps=60", "train.sequence_length=128", "optimizer.lr=1e-2", "evaluation.every=30", "trackers=[]"]
    # With GPUs: accelerate launch --config_file launch/local.yaml --num_processes 8 -m distopt.train engine=fsdp2 ...
    run("-m", "distopt.train", *common, *short, "name=finetune_example/full")
    out = FOLDER / "answers"
    number = 1
    while out.exists():
        number += 1
        out = FOLDER / f"answers-{number}"
    run("-m", "distopt.export", "runs/finetune_example/full", str(out))
    for country in ("Japan", "Peru"):
        question = f"What is the capital of {country}?"
        print(f"{question}  before: {answer(base, question)!r}  after: {answer(out, question)!r}")


if __name__ == "__main__":
    main()

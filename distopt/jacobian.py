"""What the blocks of a model do to a gradient: `python -m distopt.jacobian MODEL [--probes 8] [--tokens 64]`."""

from __future__ import annotations

import argparse

from distopt.bounds import integer
from distopt.job.errors import one_line_errors
from distopt.job.loading import loading


def main() -> None:
    """Print the gain of every block, their product, and the gain through all of them."""
    parser = argparse.ArgumentParser(prog="python -m distopt.jacobian", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder that distopt.export or save_pretrained wrote")
    parser.add_argument("--probes", type=int, default=8, help="random vectors (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="random tokens of the sequence (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of tokens and vectors (default: 0)")
    args = parser.parse_args()
    with one_line_errors():
        integer(1).check("--probes", args.probes)
        integer(1).check("--tokens", args.tokens)
        integer(0).check("--seed", args.seed)
        loading()
        _print(args.model, args.probes, args.tokens, args.seed)


def _print(folder: str, probes: int, tokens: int, seed: int) -> None:
    import torch  # what is mistyped, and `--help`, do not wait for it
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from distopt.health.jacobian import jacobian_gains
    from distopt.models.configuration import check_length
    from distopt.models.language_model import blocks

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", trust_remote_code=False
        ).eval()
    except OSError as error:
        raise ValueError(f"{folder}: {str(error).splitlines()[0]}") from error
    check_length(model.config, tokens, "--tokens")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (1, tokens), generator=generator)
    found = jacobian_gains(blocks(model), lambda: model(ids, use_cache=False), probes=probes, seed=seed)
    for i, gain in enumerate(found.layers):
        print(f"block {i}: {gain:.4f}")
    print(f"product: {found.product:.4g}")
    print(f"through all blocks: {found.through:.4g}")


if __name__ == "__main__":
    main()

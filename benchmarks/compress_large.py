"""Measures time and memory of compressing a large model, on a few blocks of full size with random weights.

Peak memory should be that of one block, whatever the number of blocks. The time of all blocks is extrapolated.

    python benchmarks/compress_large.py --shape llama-3.1-8b --blocks 1 2
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path


def make_model(path: Path, shape: dict[str, int], blocks: int) -> None:
    """Write a llama of this shape, tensor by tensor, with random bf16 weights and a tokenizer of single letters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from cai_runtime.slim.writer import CheckpointWriter

    config = LlamaConfig(**shape, num_hidden_layers=blocks, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    g = torch.Generator().manual_seed(0)
    with CheckpointWriter(path, config=config.to_dict() | {"architectures": ["LlamaForCausalLM"]}) as writer:
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                writer.add_tensor(name, torch.ones(parameter.shape, dtype=torch.bfloat16))
            else:
                spread = parameter.shape[1] ** -0.5
                writer.add_tensor(name, (torch.randn(parameter.shape, generator=g) * spread).bfloat16())
        writer.finish()
    letters = {chr(97 + k): k for k in range(26)} | {"<eos>": 26}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)


SHAPES = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
    },
}
WHOLE = {"llama-3.1-8b": 32, "small": 8}


def child(directory: Path, settings: dict) -> None:
    """Compress in this process. Print peak memory, memory before the start, and the stages' times."""
    import torch
    import transformers  # noqa: F401

    from cai_runtime.compressor import compress

    torch.zeros(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = compress(directory / "dense", directory / "slim", calibration=directory / "text.txt", **settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_mib": peak / 1024, "before_mib": before / 1024, "seconds": report.seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2], help="numbers of blocks to run")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--no-curvature", action="store_true")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/compress_large.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = {
        "keep": 0.5,
        "samples": args.samples,
        "sequence_length": args.sequence_length,
        "curvature": not args.no_curvature,
        "refine_epochs": 0,
        "heal_tokens": 0,
        "dtype": "bf16",
        "evaluate": False,
    }
    if args.child:
        child(args.child, settings)
        return
    runs = []
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            make_model(directory / "dense", SHAPES[args.shape], blocks)
            (directory / "text.txt").write_text(" ".join(chr(97 + (k * k + k // 7) % 26) for k in range(20_000)))
            command = [sys.executable, __file__, *sys.argv[1:], "--child", str(directory)]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            runs.append({"blocks": blocks, **found})
            print(f"{blocks} blocks: peak {found['peak_mib']:,.0f} MiB, {sum(found['seconds'].values()):.0f} s")
    if len(runs) > 1:
        first, last = runs[0], runs[-1]
        times = [sum(run["seconds"].values()) for run in (first, last)]
        each = (times[1] - times[0]) / (last["blocks"] - first["blocks"])
        whole = times[0] + each * (WHOLE[args.shape] - first["blocks"])
        print(f"{each:.0f} s a block; {WHOLE[args.shape]} blocks: {whole / 3600:.1f} h")
        summary = {"seconds_per_block": each, "blocks": WHOLE[args.shape], "hours": whole / 3600}
    else:
        summary = None
    machine = {"processor": platform.processor() or platform.machine(), "date": date.today().isoformat()}
    args.json.write_text(
        json.dumps(
            {"shape": args.shape, "settings": settings, "machine": machine, "runs": runs, "whole": summary}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    main()

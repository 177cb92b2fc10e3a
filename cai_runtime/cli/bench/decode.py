"""Tokens/s of a checkpoint while decoding.

Also GB/s read, their fraction of the memory bandwidth, time to first token and prefill tokens/s, at several batch sizes.
With --peers, llama.cpp (xllamacpp) and transformers run the same prompts in the same run.
`cai_runtime/bench/decode.py` defines each figure.
"""

from __future__ import annotations

import argparse

from cai_runtime.cli.bench.options import PEERS_MODEL, output_file, write_json
from cai_runtime.cli.options import add_device_argument, add_dtype_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="checkpoint directory, slim or plain dense")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of each answer; default: 64")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="of each prompt; default: 64")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="medians are over these; default: 3")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; default: all that this process may use")
    add_device_argument(parser)
    add_dtype_argument(parser)
    parser.add_argument("--peers", action="store_true", help="measure llama.cpp and transformers too")
    parser.add_argument(
        "--peers-model",
        default=PEERS_MODEL,
        metavar="SOURCE",
        help="where the peers get the same model, as a GGUF file and converted: a name or URI of `cai pull`; "
        f"default: {PEERS_MODEL}",
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything, machine and versions included, to FILE")


def run(args: argparse.Namespace) -> int:
    from cai_runtime.bench.checks import Peers
    from cai_runtime.bench.report import decode_json, format_decode
    from cai_runtime.bench.run import bench_decode

    out = output_file("--json", args.json)
    peers = None
    if args.peers:
        from cai_runtime.convert.sources import fetch_file, pull

        peers = Peers(gguf=fetch_file(args.peers_model), dense=pull(args.peers_model))
    report = bench_decode(
        args.dir,
        batches=args.batch,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
        repeats=args.repeats,
        threads=args.threads,
        device=args.device,
        dtype=args.dtype,
        peers=peers,
    )
    print(format_decode(report))
    write_json(out, decode_json(report))
    return 0

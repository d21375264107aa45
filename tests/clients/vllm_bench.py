"""`vllm bench serve`, without vLLM's own command, which some of its builds lack the metadata for. Takes its options."""

import argparse

from vllm.benchmarks.serve import add_cli_args, main

parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())

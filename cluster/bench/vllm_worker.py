"""Runs in an environment that has vLLM and need not have this package: one JSON line in, one out.

In: {"prompts": [[token ids]], "num_tokens": n, "sampling": fields of `cluster.bench.sampling.Sampling`}; a prompt's
seed is its place. Out: {"ready": detail} once, then {"counts": [tokens of each prompt]}.
"""

import json
import os
import sys


def main() -> None:
    # This file's neighbours are not for that environment: transformers looks for a package `kernels`.
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(__file__)]
    options = json.loads(sys.argv[1])
    del options["num_threads"]  # VLLM_CPU_OMP_THREADS_BIND sets them
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's prints must not get among the answers
    import vllm  # type: ignore[import-not-found]  # in the user's environment only

    model = vllm.LLM(skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    print(json.dumps({"ready": f"vLLM {vllm.__version__}"}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        chosen = {name: value for name, value in task["sampling"].items() if name != "name"}
        prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
        params = [
            vllm.SamplingParams(**chosen, seed=seed, max_tokens=task["num_tokens"], ignore_eos=True, detokenize=False)
            for seed in range(len(prompts))
        ]
        outputs = model.generate(prompts, params, use_tqdm=False)
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"counts": counts}), file=answers, flush=True)


if __name__ == "__main__":
    main()

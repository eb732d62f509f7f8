"""vLLM on CPU as a peer: runs in the interpreter it is installed in, and imports nothing of ours.

    python serve_vllm.py CHECKPOINT NUM_THREADS

Says and reads what serve_transformers.py says and reads. With zentorch installed vLLM takes its kernels by itself, and
is fastest uncompiled.
"""

import importlib.util
import json
import os
import random
import sys
import time

MAX_MODEL_LEN = 10240
MAX_NUM_SEQS = 128


def say(**fields):
    print("@@ " + json.dumps(fields), flush=True)


class Model:
    def __init__(self, checkpoint):
        from vllm import LLM

        with open(os.path.join(checkpoint, "config.json")) as file:
            self.vocab_size = json.load(file)["vocab_size"]
        self.llm = LLM(
            checkpoint,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_MODEL_LEN,
            enforce_eager=importlib.util.find_spec("zentorch") is not None,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def seconds(self, batch, num_tokens, num_new, seed):
        from vllm import SamplingParams, TokensPrompt

        draw = random.Random(seed)
        prompts = [
            TokensPrompt(prompt_token_ids=[draw.randrange(10, self.vocab_size) for _ in range(num_tokens)])
            for _ in range(batch)
        ]
        params = SamplingParams(
            temperature=0, max_tokens=num_new, min_tokens=num_new, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    def prefill(self, num_tokens, seed):
        return num_tokens / self.seconds(1, num_tokens, 1, seed)

    def decode(self, batch, context, num_steps, seed):
        """The difference between a long answer and one of a single token."""
        prompts_s = self.seconds(batch, context, 1, seed)
        return batch * num_steps / (self.seconds(batch, context, num_steps + 1, seed) - prompts_s)


def main():
    num_threads = int(sys.argv[2])
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm

    model = Model(sys.argv[1])
    model.seconds(1, 16, 4, 0)
    kernels = " + zentorch" if importlib.util.find_spec("zentorch") else ""
    say(ready=True, version=vllm.__version__ + kernels)
    for line in sys.stdin:
        what, *numbers = line.split()
        measure = {"prefill": model.prefill, "decode": model.decode}[what]
        say(tokens_per_s=measure(*map(int, numbers)))


if __name__ == "__main__":
    main()

"""transformers as a peer: runs in the interpreter it is installed in, and imports nothing of ours.

    python serve_transformers.py CHECKPOINT NUM_THREADS

Says `@@ {json}` when it is ready, and once for each line that it reads:
    prefill NUM_TOKENS SEED                    a prompt from an empty cache, logits of its last token
    decode BATCH CONTEXT NUM_STEPS SEED        greedy steps after prompts of CONTEXT tokens, prompts not counted
"""

import json
import sys
import time

import torch
import transformers

MAX_TRIAL_TOKENS = 512  # of a prompt, to find the faster way


def say(**fields):
    print("@@ " + json.dumps(fields), flush=True)


class Model:
    def __init__(self, checkpoint):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto", attn_implementation="sdpa", experts_implementation="grouped_mm"
        ).eval()
        self.faster = {}  # by number of rows: the way of computing experts that was faster on a trial

    def prompt(self, batch, num_tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(10, self.model.config.vocab_size, (batch, num_tokens), generator=generator)

    def forward(self, ids, cache=None):
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def use_faster_experts(self, ids, num_forwards):
        """Its grouped product is faster for many rows, its plain loop for few; from where on differs by machine."""
        ids = ids[:, :MAX_TRIAL_TOKENS]
        num_rows = ids.numel()
        if num_rows not in self.faster:
            times = {}
            for name in ("grouped_mm", "eager"):
                self.model.set_experts_implementation(name)
                self.forward(ids)
                start = time.perf_counter()
                for _ in range(num_forwards):
                    self.forward(ids)
                times[name] = time.perf_counter() - start
            self.faster[num_rows] = min(times, key=times.get)
        self.model.set_experts_implementation(self.faster[num_rows])

    def prefill(self, num_tokens, seed):
        ids = self.prompt(1, num_tokens, seed)
        self.use_faster_experts(ids, 1)
        start = time.perf_counter()
        self.forward(ids)
        return num_tokens / (time.perf_counter() - start)

    def decode(self, batch, context, num_steps, seed):
        rows = self.prompt(batch, context, seed)
        self.model.set_experts_implementation("grouped_mm")
        out = self.forward(rows)
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        self.use_faster_experts(ids, 4)
        start = time.perf_counter()
        for _ in range(num_steps):
            out = self.forward(ids, cache)
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        return batch * num_steps / (time.perf_counter() - start)


def main():
    torch.set_num_threads(int(sys.argv[2]))
    torch.set_grad_enabled(False)
    model = Model(sys.argv[1])
    model.prefill(16, 0)
    model.decode(1, 16, 2, 0)
    say(ready=True, version=transformers.__version__)
    for line in sys.stdin:
        what, *numbers = line.split()
        measure = {"prefill": model.prefill, "decode": model.decode}[what]
        say(tokens_per_s=measure(*map(int, numbers)))


if __name__ == "__main__":
    main()

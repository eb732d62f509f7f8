"""Decoders whose next token is computed by hand, and a tokenizer for which a token is a byte."""

from collections.abc import Callable

import tokenizers
import torch
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from attention.engine import Engine
from attention.engine_config import EngineConfig
from attention.metrics import EngineMetrics
from attention.model_runner import ModelRunner
from attention.sampling_params import SamplingParams
from attention.scheduler import ScheduledBatch
from attention.sequence import Sequence, SequenceOutput
from attention.tokenizer import Tokenizer

VOCAB_SIZE = 300


class CountingDecoder:
    """The next token is the last one plus one."""

    num_dropped = None

    def __init__(self, vocab_size=VOCAB_SIZE):
        self.vocab_size = vocab_size
        self.before_forward: Callable[[torch.Tensor], None] = lambda token_ids: None

    def forward(self, token_ids, metadata, output_rows=None, on_begun=lambda: None):
        on_begun()
        self.before_forward(token_ids)
        return token_ids.unsqueeze(-1) if output_rows is None else token_ids.unsqueeze(-1)[output_rows]

    def logits(self, hidden_states):
        return torch.nn.functional.one_hot((hidden_states[:, 0] + 1) % self.vocab_size, self.vocab_size).float()


class SummingDecoder(CountingDecoder):
    """The next token is the sum of all tokens before it plus one, read back from a cache by the block tables."""

    def __init__(self, num_blocks, block_size, vocab_size=VOCAB_SIZE):
        super().__init__(vocab_size)
        self.block_size = block_size
        self.cache = torch.full((num_blocks * block_size,), 10**6)

    def forward(self, token_ids, metadata, output_rows=None, on_begun=lambda: None):
        on_begun()
        self.before_forward(token_ids)
        self.cache[metadata.slot_mapping] = token_ids
        sums = []
        for i in range(metadata.num_seqs):
            for row in range(metadata.query_start_loc[i], metadata.query_start_loc[i + 1]):
                places = range(int(metadata.positions[row]) + 1)
                table = metadata.block_tables[i]
                slots = [int(table[p // self.block_size]) * self.block_size + p % self.block_size for p in places]
                sums.append(int(self.cache[slots].sum()))
        hidden_states = torch.tensor(sums).unsqueeze(-1)
        return hidden_states if output_rows is None else hidden_states[output_rows]


def summed_tokens(prompt, count, vocab_size=VOCAB_SIZE):
    """What a SummingDecoder generates after the prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((sum(tokens) + 1) % vocab_size)
    return tokens[len(prompt) :]


def make_sequence(prompt=(1, 2, 3), max_tokens=4, name="request", max_num_tokens=None, **params):
    eos_token_ids = params.pop("eos_token_ids", frozenset())
    text_decoder = params.pop("text_decoder", None)
    values = {"temperature": 0.0, "seed": 0, **params}
    return Sequence(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(max_tokens=max_tokens, **values),
        max_num_tokens=max_num_tokens or len(prompt) + max_tokens,
        eos_token_ids=eos_token_ids,
        text_decoder=text_decoder,
    )


class Listener:
    """Remembers the outputs of one sequence."""

    def __init__(self):
        self.outputs: list[SequenceOutput] = []

    def __call__(self, output):
        assert not self.outputs or not self.outputs[-1].is_final, "an output after the final one"
        self.outputs.append(output)

    @property
    def is_done(self):
        return bool(self.outputs) and self.outputs[-1].is_final

    @property
    def token_ids(self):
        return [token_id for output in self.outputs for token_id in output.token_ids]

    @property
    def text(self):
        return "".join(output.text for output in self.outputs)

    @property
    def finish_reason(self):
        return self.outputs[-1].finish_reason

    @property
    def error(self):
        return self.outputs[-1].error


class Recorder:
    """A runner that remembers its batches."""

    def __init__(self, runner):
        self.runner = runner
        self.batches: list[ScheduledBatch] = []

    def run(self, batch, on_begun):
        self.batches.append(batch)
        return self.runner.run(batch, on_begun)


def make_engine(decoder=None, *, num_blocks=64, registry=None, clock=None, limit_step=None, poller=None, **config):
    """An engine without a thread; call step. Blocks hold 4 tokens."""
    values = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 16, **config}
    engine_config = EngineConfig(**values)
    decoder = decoder or CountingDecoder()
    runner = Recorder(ModelRunner(decoder, block_size=engine_config.block_size))
    metrics = EngineMetrics(registry or CollectorRegistry(), dp_rank=0)
    options = {"clock": clock, "limit_step": limit_step, "poller": poller}
    options = {name: value for name, value in options.items() if value is not None}
    engine = Engine(engine_config, runner, num_blocks=num_blocks, metrics=metrics, **options)
    engine.recorder = runner
    return engine


def run_to_end(engine, limit=10_000):
    for _ in range(limit):
        if not engine.step():
            return
    raise AssertionError(f"not idle after {limit} steps")


def make_byte_tokenizer(chat_template=None, adds_bos=False):
    """Token ids 0 to 255 are the bytes; 256 is <bos>, 257 is <eos>."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    visible = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    hidden = [byte for byte in range(256) if byte not in visible]
    texts = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    assert set(texts.values()) == set(alphabet)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={texts[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<bos>", "<eos>")])
    return Tokenizer(
        tokenizer,
        special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"},
        adds_bos=adds_bos,
        chat_template=chat_template,
        eos_token_ids=frozenset({257}),
    )

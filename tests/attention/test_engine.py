import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from attention.engine import NonFiniteLogits, _Stop
from attention.engine_config import CacheTooSmall, EngineConfig
from attention.sequence import FinishReason
from protos import errors
from tests.attention.fake_decoder import (
    CountingDecoder,
    Listener,
    SummingDecoder,
    make_engine,
    make_sequence,
    run_to_end,
    summed_tokens,
)

pytestmark = pytest.mark.timeout(60)


def submit(engine, *prompts, **params):
    listeners = [Listener() for _ in prompts]
    sequences = [make_sequence(prompt, name=f"request-{i}", **params) for i, prompt in enumerate(prompts)]
    for sequence, listener in zip(sequences, listeners, strict=True):
        engine.submit(sequence, listener)
    return listeners if len(listeners) > 1 else (sequences[0], listeners[0])


def assert_all_blocks_are_free(engine):
    engine._block_manager.check_integrity()
    assert engine.stats.num_free_blocks == engine.stats.num_blocks
    assert (engine.stats.num_running, engine.stats.num_waiting) == (0, 0)
    assert engine._num_not_started == 0


def test_tokens_come_one_a_step_and_the_last_says_why():
    engine = make_engine()
    _, listener = submit(engine, [7], max_tokens=3)
    run_to_end(engine)
    assert [output.token_ids for output in listener.outputs] == [(8,), (9,), (10,)]
    assert [output.finish_reason for output in listener.outputs] == [None, None, FinishReason.LENGTH]
    assert_all_blocks_are_free(engine)


def test_listeners_are_told_as_the_next_steps_layers_begin_or_when_there_is_no_next_step():
    told_before_layers: list[int] = []
    decoder = CountingDecoder()
    engine = make_engine(decoder)
    _, listener = submit(engine, [7], max_tokens=2)
    decoder.before_forward = lambda token_ids: told_before_layers.append(len(listener.outputs))
    engine.step()
    assert listener.outputs == []
    engine.step()
    assert (told_before_layers, listener.is_done) == ([0, 1], False)
    assert not engine.step()
    assert listener.is_done


def test_what_is_not_told_yet_is_told_when_the_engine_stops():
    engine = make_engine()
    _, listener = submit(engine, [7], max_tokens=9)
    engine.step()
    engine.stop()
    assert listener.token_ids == [8]
    assert isinstance(listener.error, errors.WorkerStopping)


def test_step_without_work_does_nothing():
    assert not make_engine().step()


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 299), min_size=1, max_size=20), st.integers(1, 12)), min_size=1, max_size=7
    ),
    num_blocks=st.integers(8, 12),
    budget=st.integers(4, 20),
    steps_between=st.integers(0, 4),
)
def test_tokens_are_those_of_each_request_alone_whatever_is_preempted(requests, num_blocks, budget, steps_between):
    decoder = SummingDecoder(num_blocks, block_size=4)
    engine = make_engine(decoder, num_blocks=num_blocks, max_num_batched_tokens=budget, max_num_seqs=4)
    listeners = []
    for prompt, max_tokens in requests:
        listeners.append(Listener())
        engine.submit(make_sequence(prompt, max_tokens), listeners[-1])
        for _ in range(steps_between):
            engine.step()
    run_to_end(engine)
    for (prompt, max_tokens), listener in zip(requests, listeners, strict=True):
        assert listener.token_ids == summed_tokens(prompt, max_tokens)
        assert listener.is_done
    assert all(batch.num_tokens <= budget for batch in engine.recorder.batches)
    assert_all_blocks_are_free(engine)


def test_preempted_requests_give_the_tokens_they_would_have_given():
    def sampled_tokens(num_blocks):
        class SmoothDecoder(CountingDecoder):
            def logits(self, hidden_states):
                return torch.cos(hidden_states.float() * torch.arange(1.0, 31.0))

        engine = make_engine(SmoothDecoder(), num_blocks=num_blocks)
        listeners = [Listener() for _ in range(4)]
        for i, listener in enumerate(listeners):
            engine.submit(make_sequence([i], max_tokens=20, temperature=1.0, seed=i), listener)
        run_to_end(engine)
        return engine.stats.num_preemptions, [listener.token_ids for listener in listeners]

    (few, tokens), (many, tokens_after_preemption) = sampled_tokens(num_blocks=64), sampled_tokens(num_blocks=8)
    assert few == 0
    assert many > 0
    assert tokens_after_preemption == tokens
    assert len({tuple(row) for row in tokens}) == 4


def test_aborted_request_frees_its_blocks_within_a_step():
    engine = make_engine()
    sequence, listener = submit(engine, [1, 2, 3], max_tokens=50)
    engine.step()
    assert engine.stats.num_free_blocks < engine.stats.num_blocks
    engine.abort(sequence)
    engine.step()
    assert listener.finish_reason is FinishReason.ABORT
    assert_all_blocks_are_free(engine)
    engine.abort(sequence)
    assert not engine.step()


def test_request_can_be_aborted_before_it_runs():
    engine = make_engine()
    sequence, listener = submit(engine, [1])
    engine.abort(sequence)
    assert not engine.step()
    assert listener.is_done
    assert_all_blocks_are_free(engine)


def test_a_request_whose_deadline_passed_ends_before_another_step_is_spent_on_it():
    now_s = 0.0
    limits = []
    engine = make_engine(clock=lambda: now_s, limit_step=limits.append)
    listeners = [Listener(), Listener()]
    for listener, deadline_s in zip(listeners, (5.0, 9.0), strict=True):
        sequence = make_sequence([1], max_tokens=50)
        sequence.deadline_s = deadline_s
        engine.submit(sequence, listener)
    engine.step()
    now_s = 5.0
    engine.step()
    assert [len(batch.sequences) for batch in engine.recorder.batches] == [2, 1]
    assert isinstance(listeners[0].error, errors.DeadlineExceeded)
    assert "after 1 tokens" in str(listeners[0].error)
    assert [limit.deadline_s for limit in limits] == [9.0, 9.0]
    engine.abort(sequence)
    assert not limits[-1].is_wanted()
    engine.step()
    assert_all_blocks_are_free(engine)


def test_waiting_requests_are_bounded_and_a_started_one_makes_place():
    engine = make_engine(max_num_waiting=2)
    submit(engine, [1], [2], max_tokens=4)
    with pytest.raises(errors.QueueFull, match="2 requests wait, limit is 2") as raised:
        submit(engine, [3])
    assert raised.value.retry_after_s is not None
    engine.step()
    submit(engine, [3])
    run_to_end(engine)
    assert_all_blocks_are_free(engine)


def test_request_that_can_never_fit_is_refused_with_the_numbers():
    engine = make_engine(num_blocks=2)
    with pytest.raises(errors.CapacityExceeded, match="may need 9 tokens of latent cache, there are 8"):
        submit(engine, [1, 2, 3], max_tokens=6)


def test_failed_step_ends_exactly_its_batch_with_its_error():
    decoder = CountingDecoder()
    engine = make_engine(decoder, max_num_seqs=1)
    first, second = submit(engine, [1], [50])
    failure = errors.ShardUnavailable("shard 3 is gone")

    def fail(token_ids):
        raise failure

    decoder.before_forward = fail
    engine.step()
    decoder.before_forward = lambda token_ids: None
    engine.step()
    assert (first.error, second.outputs) == (failure, [])
    run_to_end(engine)
    assert second.token_ids == [51, 52, 53, 54]
    assert_all_blocks_are_free(engine)


def test_unexpected_exception_is_logged_under_the_id_that_the_client_sees(caplog):
    decoder = CountingDecoder()
    engine = make_engine(decoder)
    _, listener = submit(engine, [1])
    decoder.before_forward = lambda token_ids: 1 // 0
    run_to_end(engine)
    assert isinstance(listener.error, errors.InternalError)
    error_id = str(listener.error).split("find ")[1].split(" ")[0]
    assert error_id in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert_all_blocks_are_free(engine)


def test_logits_that_are_not_numbers_end_their_sequence_only():
    class NanAfter100(CountingDecoder):
        def logits(self, hidden_states):
            return torch.where(hidden_states > 100, torch.nan, super().logits(hidden_states))

    engine = make_engine(NanAfter100())
    good, bad = submit(engine, [5], [99], max_tokens=4)
    run_to_end(engine)
    assert good.token_ids == [6, 7, 8, 9]
    assert bad.token_ids == [100, 101]
    assert isinstance(bad.error, NonFiniteLogits)
    assert_all_blocks_are_free(engine)


def test_text_that_cannot_be_made_ends_its_sequence_only(caplog):
    class BrokenText:
        matched_stop = None

        def push(self, token_id):
            raise KeyError(token_id)

    engine = make_engine()
    _, bad = submit(engine, [1], text_decoder=BrokenText())
    _, good = submit(engine, [5])
    run_to_end(engine)
    assert isinstance(bad.error, errors.InternalError)
    assert good.token_ids == [6, 7, 8, 9]
    assert_all_blocks_are_free(engine)


def test_failing_listener_aborts_its_request_only(caplog):
    engine = make_engine()

    def fail(output):
        raise RuntimeError("the event loop is closed")

    engine.submit(make_sequence([1], max_tokens=50), fail)
    _, good = submit(engine, [5], max_tokens=8)
    run_to_end(engine)
    assert good.token_ids == list(range(6, 14))
    assert "its listener failed" in caplog.text
    assert_all_blocks_are_free(engine)


def test_metrics_tell_what_happened():
    registry, now = CollectorRegistry(), [100.0]
    engine = make_engine(registry=registry, clock=lambda: now[0], max_num_batched_tokens=8)
    submit(engine, [7, 7, 7], max_tokens=3)
    for _ in range(3):
        now[0] += 0.5
        engine.step()

    def value(name, **labels):
        return registry.get_sample_value(name, {"dp_rank": "0", **labels})

    assert value("mobula_prompt_tokens_total") == 3
    assert value("mobula_generation_tokens_total") == 3
    assert value("mobula_request_success_total", finish_reason="length") == 1
    assert value("mobula_request_success_total", finish_reason="stop") == 0
    assert value("mobula_request_queue_time_seconds_sum") == 0.5
    assert value("mobula_time_to_first_token_seconds_sum") == 0.5
    assert value("mobula_inter_token_latency_seconds_sum") == 1.0
    assert value("mobula_inter_token_latency_seconds_count") == 2
    assert value("mobula_e2e_request_latency_seconds_sum") == 1.5
    assert value("mobula_iteration_tokens_sum") == 5
    assert value("mobula_num_requests_running") == 0
    assert value("mobula_latent_cache_usage_ratio") == 0


def test_usage_of_the_cache_is_published_while_requests_run():
    registry = CollectorRegistry()
    engine = make_engine(registry=registry, num_blocks=4)
    submit(engine, [1], [2], max_tokens=8)
    engine.step()
    assert (engine.stats.num_running, engine.stats.cache_usage_ratio) == (2, 0.5)
    assert registry.get_sample_value("mobula_latent_cache_usage_ratio", {"dp_rank": "0"}) == 0.5


def test_thread_serves_and_stop_drains_what_was_submitted():
    engine = make_engine()
    engine.start()
    listeners = submit(engine, *[[i] for i in range(20)], max_tokens=30)
    engine.stop(drain_timeout_s=60.0)
    assert [listener.token_ids for listener in listeners] == [[i + j for j in range(1, 31)] for i in range(20)]
    assert not engine.is_alive
    assert_all_blocks_are_free(engine)
    with pytest.raises(errors.Unavailable):
        submit(engine, [1])


def test_stop_without_drain_ends_every_request():
    decoder, entered, may_go = CountingDecoder(), threading.Event(), threading.Event()

    def wait(token_ids):
        entered.set()
        may_go.wait()

    decoder.before_forward = wait
    engine = make_engine(decoder, max_num_seqs=2)
    engine.start()
    listeners = submit(engine, *[[i] for i in range(5)], max_tokens=250)
    entered.wait()
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    while engine._is_accepting:
        pass
    may_go.set()
    stopper.join()
    assert all(isinstance(listener.error, errors.Unavailable) for listener in listeners)
    assert_all_blocks_are_free(engine)


def test_drain_ends_with_its_time():
    now = [0.0]
    engine = make_engine(clock=lambda: now[0])
    _, listener = submit(engine, [1], max_tokens=200)
    engine._handle(_Stop(deadline_s=5.0))
    engine.step()
    assert not listener.is_done
    now[0] = 5.0
    engine.step()
    assert isinstance(listener.error, errors.Unavailable)
    assert_all_blocks_are_free(engine)


def test_engine_that_was_never_started_ends_its_requests_at_stop():
    engine = make_engine()
    _, listener = submit(engine, [1])
    engine.stop()
    assert isinstance(listener.error, errors.Unavailable)
    assert_all_blocks_are_free(engine)


def test_broken_accounting_ends_the_thread_and_every_request(caplog):
    engine = make_engine()
    engine._block_manager._free_block_ids.append(0)
    engine.start()
    engine._thread.join()
    assert not engine.is_alive
    assert "accounting failed" in caplog.text
    with pytest.raises(errors.Unavailable):
        submit(engine, [1])


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"max_num_seq": 1}, "max_num_seq"),
        ({"max_num_seqs": "2"}, "max_num_seqs"),
        ({"max_num_seqs": True}, "max_num_seqs"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": -1}, "block_size"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 63}, "must be at least max_num_seqs"),
    ],
)
def test_configuration_refuses_what_makes_no_sense(values, path):
    with pytest.raises(ValidationError, match=path):
        EngineConfig(**values)


def test_cache_takes_what_is_configured_but_never_more_than_can_be_used():
    mib = 2**20
    assert EngineConfig(cache_gib=1.0).num_cache_blocks(mib, 10**6) == 1024
    assert EngineConfig(cache_gib=1.0, max_num_seqs=2).num_cache_blocks(mib, 640) == 20
    assert EngineConfig(num_blocks=7).num_cache_blocks(mib, 640) == 7
    with pytest.raises(
        CacheTooSmall, match=r"is 0.0001, one block of 16 tokens needs 0.000101 \(107400 bytes\); raise"
    ):
        EngineConfig(cache_gib=0.0001, block_size=16).num_cache_blocks(107_400, 640)
    assert EngineConfig(cache_gib=0.000101).num_cache_blocks(107_400, 640) == 1


def test_context_is_what_model_and_cache_can_both_hold():
    assert EngineConfig().resolved_max_model_len(num_blocks=100, max_position_embeddings=4096) == 4096
    assert EngineConfig().resolved_max_model_len(num_blocks=10, max_position_embeddings=4096) == 640
    assert EngineConfig(max_model_len=128).resolved_max_model_len(10, 4096) == 128
    with pytest.raises(CacheTooSmall, match="max_model_len is 700"):
        EngineConfig(max_model_len=700).resolved_max_model_len(10, 4096)

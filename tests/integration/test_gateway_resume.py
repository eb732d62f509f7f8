"""A gateway goes on with an answer when its worker is lost."""

import time

import grpc
import pytest

from cluster.gateway.request_cost import FIRST_BYTES_PER_TOKEN, WEIGHT
from protos import errors, generation_pb2
from tests.gateway_front import NUM_PROMPT_TOKENS, front


def test_an_answer_goes_on_with_another_worker_when_its_own_is_lost() -> None:
    with front() as opened:
        opened.workers[0].num_until_cut = 3
        answers = list(opened.generate("count to 6"))
        assert "".join(answer.text for answer in answers) == "0 1 2 3 4 5 "
        assert [token_id for answer in answers for token_id in answer.token_ids] == [0, 1, 2, 3, 4, 5]
        first, second = opened.workers[0].relayed[0], opened.workers[1].relayed[0]
        assert list(second.output_token_ids) == [0, 1, 2]
        assert (first.request, first.seed, first.request_id) == (second.request, second.seed, second.request_id)
        registry = opened.metrics.registry
        assert registry.get_sample_value("mobula_gateway_resumes_total", {"reason": "lost"}) == 1
        assert registry.get_sample_value("mobula_gateway_resume_pause_seconds_count") == 1


def test_a_worker_that_is_lost_after_the_last_answer_is_not_missed() -> None:
    with front() as opened:
        opened.workers[0].num_until_cut = 2
        assert [answer.text for answer in opened.generate("count to 2")] == ["0 ", "1 "]
        assert not opened.workers[1].relayed


def test_an_answer_that_has_begun_waits_for_a_worker_and_ends_when_none_comes() -> None:
    with front(num_workers=1, resume_timeout_s=0.5) as opened:
        opened.workers[0].num_until_cut = 1
        answers = opened.generate("count to 3")
        assert next(answers).text == "0 "
        with pytest.raises(grpc.RpcError) as raised:
            next(answers)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_request_that_loses_worker_after_worker_is_given_up() -> None:
    with front(num_workers=4) as opened:
        for worker in opened.workers:
            worker.num_until_cut = 1
        answers = opened.generate("count to 9")
        with pytest.raises(grpc.RpcError) as raised:
            list(answers)
        assert "3 attention workers were lost" in raised.value.details()
        assert not opened.workers[3].relayed


def test_a_worker_that_stops_hands_its_requests_over() -> None:
    with front() as opened:
        opened.workers[0].error = errors.WorkerStopping("the worker has stopped")
        assert [answer.text for answer in opened.generate("count to 2")] == ["0 ", "1 "]


def test_a_worker_that_says_nothing_on_an_open_connection_is_left_and_used_again_when_it_is_heard() -> None:
    with front() as opened:
        silent = opened.gateway.pool.workers[0]
        opened.workers[0].num_until_held = 3
        began_s = time.monotonic()
        answers = list(opened.generate("count to 6"))
        assert [token_id for answer in answers for token_id in answer.token_ids] == [0, 1, 2, 3, 4, 5]
        assert time.monotonic() - began_s < 3.0  # keepalive takes 5
        assert list(opened.workers[1].relayed[0].output_token_ids) == [0, 1, 2]
        registry = opened.metrics.registry
        assert registry.get_sample_value("mobula_gateway_resumes_total", {"reason": "silent"}) == 1
        assert [answer.text for answer in opened.generate("count to 1")] == ["0 "]  # at once: not where nobody answers
        assert silent.is_silent
        assert len(opened.workers[1].relayed) == 2
        opened.workers[0].link.release()
        give_up_s = time.monotonic() + 5.0
        while silent.is_silent:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        list(opened.generate("count to 1"))
        assert len(opened.workers[0].relayed) == 2


def test_a_silent_worker_keeps_its_calls_while_there_is_no_other() -> None:
    with front(num_workers=1) as opened:
        opened.workers[0].num_until_held = 1
        answers = opened.generate("count to 3")
        assert next(answers).text == "0 "
        give_up_s = time.monotonic() + 5.0
        while not opened.gateway.pool.workers[0].is_silent:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        opened.workers[0].link.release()
        assert [answer.text for answer in answers] == ["1 ", "2 "]
        assert len(opened.workers[0].relayed) == 1


def test_a_silent_worker_keeps_its_calls_while_no_other_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with front() as opened:
        opened.workers[0].num_until_held = 0
        unreachable = grpc.ChannelConnectivity.TRANSIENT_FAILURE
        monkeypatch.setattr(opened.gateway.pool.workers[1].channel, "get_state", lambda **_: unreachable)
        give_up_s = time.monotonic() + 5.0
        answers = opened.generate("count to 2")
        while not opened.gateway.pool.workers[0].is_silent:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        time.sleep(0.3)  # some turns of the watch
        opened.workers[0].link.release()
        assert [answer.text for answer in answers] == ["0 ", "1 "]
        assert len(opened.workers[0].relayed) == 1


def test_a_request_that_finds_every_worker_silent_waits_for_the_first_that_is_heard() -> None:
    with front() as opened:
        for worker in opened.workers:
            worker.num_until_held = 0
        answers = opened.generate("count to 2")
        give_up_s = time.monotonic() + 5.0
        while not all(worker.is_silent for worker in opened.gateway.pool.workers.values()):
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        for worker in opened.workers:
            worker.num_until_held = None
            worker.link.release()
        assert [answer.text for answer in answers] == ["0 ", "1 "]


def test_tokens_that_a_client_had_are_a_part_of_what_it_sent_and_not_of_what_was_generated() -> None:
    with front(num_workers=1) as opened:
        costs = opened.gateway._admission.costs
        before = costs.estimate(0).completion_tokens
        request = generation_pb2.GenerateRequest(text="count to 6", received_token_ids=[0, 1, 2, 3])
        assert [answer.text for answer in opened.stub.Generate(request, timeout=10.0)] == ["4 ", "5 "]
        assert costs.estimate(0).completion_tokens == pytest.approx((1 - WEIGHT) * before + WEIGHT * 2)
        num_bytes = request.ByteSize()
        mean = (1 - WEIGHT) * FIRST_BYTES_PER_TOKEN + WEIGHT * num_bytes / (NUM_PROMPT_TOKENS + 4)
        assert costs.estimate(1000).prompt_tokens == pytest.approx(1000 / mean)

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from protos import errors


def all_errors(base: type[errors.MobulaError] = errors.MobulaError) -> list[type[errors.MobulaError]]:
    return [base, *(found for child in base.__subclasses__() for found in all_errors(child))]


def details_of(error: errors.MobulaError) -> status_pb2.Status:
    metadata = dict(errors.to_status(error).trailing_metadata)
    return status_pb2.Status.FromString(metadata["grpc-status-details-bin"])


@pytest.mark.parametrize("error_class", all_errors())
def test_every_error_has_a_status_a_reason_and_keeps_its_message(error_class):
    error = error_class("value 5, limit 4")
    status = errors.to_status(error)
    assert (status.code, status.details) == (error.code, "value 5, limit 4")
    assert error.code is not grpc.StatusCode.OK
    info = error_details_pb2.ErrorInfo()
    assert details_of(error).details[0].Unpack(info)
    assert (info.reason, info.domain) == (error.reason, "mobula")


def test_the_field_at_fault_and_the_time_to_retry_are_told():
    detail_bytes = details_of(errors.QueueFull("full", field="sampling_params.top_p", retry_after_s=1.5)).details
    violations, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    assert detail_bytes[1].Unpack(violations)
    assert detail_bytes[2].Unpack(retry)
    assert violations.field_violations[0].field == "sampling_params.top_p"
    assert retry.retry_delay.ToNanoseconds() == 1_500_000_000


@pytest.mark.parametrize(
    "error_class",
    [errors.InvalidRequest, errors.QueueFull, errors.StalePlacement, errors.Unavailable, errors.InternalError],
)
def test_an_error_that_travelled_in_a_frame_is_the_same_error(error_class):
    error = errors.from_code(errors.code_number(error_class("why")), "why")
    assert type(error) is error_class
    assert str(error) == "why"


def test_an_unknown_code_is_an_internal_error():
    assert type(errors.from_code(9999, "?")) is errors.InternalError

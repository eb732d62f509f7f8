"""Messages as JSON for programs."""

import json

from cluster.commands.message_fields import plain_fields
from cluster.controller.admin_messages import rebalance_message, status_message
from cluster.controller.rebalance import RebalanceState, RebalanceStatus
from protos import admin_pb2
from tests.fake_controller import rebalance_plan, serving_status


def test_every_field_is_there_with_numbers_as_numbers_and_states_as_words() -> None:
    rebalance = RebalanceStatus(state=RebalanceState.STAGING, target_version=2, moved_bytes=2**40)
    fields = json.loads(json.dumps(plain_fields(status_message(serving_status(1, rebalance)))))
    assert set(fields) == {field.name for field in admin_pb2.GetStatusResponse.DESCRIPTOR.fields}
    assert fields["processes"][0]["state"] == "ready"
    assert fields["processes"][0]["weight_bytes"] == 2**30
    assert fields["rebalance"]["state"] == "staging"
    assert fields["rebalance"]["moved_bytes"] == 2**40
    assert fields["rebalance"]["seconds_since_success"] is None


def test_a_message_within_a_message_is_null_when_unset_and_lists_may_be_empty() -> None:
    fields = plain_fields(admin_pb2.GetStatusResponse())
    assert fields == {"processes": [], "is_serving": False, "placement_version": 0, "rebalance": None}


def test_moves_are_objects() -> None:
    fields = plain_fields(rebalance_message(rebalance_plan(), is_dry_run=True))
    assert fields["moves"][2] == {"ep_rank": 1, "layer_id": 4, "unit_id": 0, "num_bytes": 3 * 2**20}


def test_a_number_that_no_name_is_known_for_stays_a_number() -> None:
    assert plain_fields(admin_pb2.RebalanceStatus(state=99))["state"] == 99

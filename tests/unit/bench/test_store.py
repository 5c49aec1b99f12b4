"""What a comparison keeps: going on with its rounds, and none of another configuration."""

from __future__ import annotations

import pytest

from tests.support.rounds import asked, isd_round, place, plain_round
from vllm_idlm.bench.config import ConfigError
from vllm_idlm.bench.store import Record, Store


def test_going_on_keeps_rounds_and_refuses_another_configuration(tmp_path):
    made = asked(tmp_path)
    store = Store(made)
    store.begin(resume=False, fresh=False)
    store.add([Record(place(0), "plain", plain_round()), Record(place(0), "isd", isd_round())])
    with store.rounds.open("a") as file:
        file.write('{"place": [0, 0.0')  # cut off while it was written
    with pytest.raises(ConfigError, match="unfinished comparison: --resume goes on, --fresh begins anew"):
        Store(made).begin(resume=False, fresh=False)
    again = Store(made)
    again.begin(resume=True, fresh=False)
    assert again.lacks(place(0), ["plain", "isd"]) == []
    assert again.lacks(place(1), ["plain"]) == ["plain"]
    assert again.records[place(0), "isd"].figures == isd_round()
    with pytest.raises(ConfigError, match="another configuration"):
        Store(asked(tmp_path, rounds=9)).begin(resume=True, fresh=False)
    fresh = Store(made)
    fresh.begin(resume=False, fresh=True)
    assert not fresh.records

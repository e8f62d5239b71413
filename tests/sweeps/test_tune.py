"""How Ray Tune is driven, as far as that shows without a Ray."""

from __future__ import annotations

import pytest
from ray.tune.execution import class_cache

from starling.orchestrator.sweeps.trial_actor import StarlingTrial
from starling.orchestrator.sweeps.tune import _plain_actors


@pytest.mark.parametrize(("variables", "expected"), [({}, None), ({"AWS_SESSION_TOKEN": "x"}, {"PL_DISABLE_FORK"})])
def test_trials_have_no_variables_of_their_own_unless_somebody_has_set_one(
    variables: dict[str, str], expected: set[str] | None, monkeypatch: pytest.MonkeyPatch
):
    """With any, all processes of a trial would be booted twice."""
    for name in class_cache.ENV_VARS_TO_PROPAGATE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = class_cache._ActorClassCache.get
    with _plain_actors():
        made = class_cache._ActorClassCache().get(StarlingTrial)
    assert class_cache._ActorClassCache.get is before
    given = made._default_options.get("runtime_env")
    assert (given and given["env_vars"].keys()) == (expected and expected | variables.keys())

"""Policies: what a file means, what it defaults to, and what is wrong with it, in one line."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from inferfleet import policies
from inferfleet.errors import ConfigError
from inferfleet.policies import Policy, default_policy, load_policy, parse_policy


def test_an_empty_policy_is_the_default_canary() -> None:
    """Shadow, then 1, 5, 25 and 50 %, no gates, an hour to bake."""
    policy = parse_policy("", "policy.toml")

    assert policy == default_policy()
    assert [(step.percent, step.dwell_s, step.minimum) for step in policy.steps] == [
        (1, 600, 1_000),
        (5, 900, 2_000),
        (25, 1_200, 3_000),
        (50, 1_800, 5_000),
    ]
    assert (policy.shadow.duration_s, policy.shadow.minimum_pairs) == (1_800, 5_000)
    assert (policy.gate_before, policy.step_limit_s, policy.bake_s) == ((), 21_600, 3_600)


def test_a_critical_topic_has_gates() -> None:
    """Before 50 % and before all of it; a switch has the one gate."""
    assert parse_policy("critical = true", "p").gate_before == (50, 100)
    assert parse_policy('critical = true\nkind = "blue-green"', "p").gate_before == (100,)
    assert parse_policy("critical = true\ngate_before = [5]", "p").gate_before == (5,)


def test_a_quiet_topic_asks_a_person() -> None:
    """Fewer pairs, larger steps, and nobody but a person promotes."""
    policy = parse_policy('profile = "quiet"', "p")

    assert policy.shadow.minimum_pairs == 500
    assert [step.percent for step in policy.steps] == [10, 50]
    assert policy.gate_before == (100,)


def test_tables_and_lists_are_read() -> None:
    """Steps, guardrails and metrics are as the file says, the rest as by default."""
    policy = parse_policy(
        """
        kind = "ab"
        [guardrails]
        error_points = 1
        [ab]
        share = 0.2
        feedback = "kafka:clicks"
        [[metric]]
        name = "clicked"
        minimum_effect = 0.01
        """,
        "p",
    )

    assert policy.guardrails.error_points == 1
    assert policy.guardrails.error_ratio == 1.25
    assert policy.ab.share == 0.2
    assert [metric.name for metric in policy.metrics] == ["clicked"]
    assert not policy.shadow.enabled
    assert policy.steps == ()


def test_labels_are_for_canaries_and_switches_too() -> None:
    """A metric has a margin there; an A/B test's topic may stand in either place."""
    for kind in ("canary", "blue-green"):
        policy = parse_policy(
            f'''
            kind = "{kind}"
            feedback = "kafka:labels"
            feedback_horizon_s = 60
            [[metric]]
            name = "correct"
            margin = 0.1
            ''',
            "p",
        )
        assert (policy.feedback_topic, policy.label_horizon_s) == ("kafka:labels", 60)
        assert [(each.name, each.margin, each.goal) for each in policy.metrics] == [("correct", 0.1, "up")]
    metric = "[[metric]]\nname = 'a'\n"
    for text in ("kind = 'ab'\nfeedback = 'kafka:t'\n", "kind = 'ab'\nab.feedback = 'kafka:t'\n"):
        assert parse_policy(text + metric, "p").feedback_topic == "kafka:t"
    assert default_policy().feedback_topic == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("knd = 'ab'", 'policy.toml: policy has no key "knd"; did you mean "kind"?'),
        ("kind = 'blue'", 'policy.toml: policy kind is "blue", must be one of'),
        ("[guardrails]\nalpha = 'x'", 'policy.toml: policy [guardrails] alpha is "x", must be a number'),
        ("[holds]\nmots = 3", 'policy.toml: policy [holds] has no key "mots"; did you mean "most"?'),
        ("[step]\npercent = 3", "policy.toml: policy steps are tables, written [[step]]"),
        ("step = []", "policy.toml: policy steps are tables, written [[step]]"),
        ("shadow = 1", "policy.toml: policy shadow is a table, [shadow]"),
        ("[[step]]\npercent = 5", 'policy.toml: policy [[step]] number 1 needs the key "dwell_s"'),
        ("gate_before = [7]", "policy.toml: policy gate_before 7 is no step; there are 1, 5, 25, 50, 100"),
        ("kind = 'shadow'\nshadow.enabled = false", "policy.toml: policy [shadow] enabled must be true"),
        ("kind = 'shadow'\n[ab]\nlooks = 3", 'policy.toml: policy ab is for kind ab, not "shadow"'),
        (
            "kind = 'shadow'\nfeedback = 'kafka:t'",
            "policy.toml: policy feedback is for kind canary or blue-green or",
        ),
        ("[[metric]]\nname = 'a'", 'policy.toml: policy feedback must be "kafka:TOPIC"'),
        ("feedback = 'redis'", 'policy.toml: policy feedback must be "kafka:TOPIC"'),
        (
            "feedback = 'kafka:t'\n[[metric]]\nname = 'a'\nprimary = true",
            'policy.toml: policy [[metric]] number 1 primary is for kind ab, not "canary"',
        ),
        (
            "kind = 'ab'\nfeedback = 'kafka:t'\n[[metric]]\nname = 'a'\nmargin = 0.1",
            'policy.toml: policy [[metric]] number 1 margin is for kind canary or blue-green, not "ab"',
        ),
        (
            "kind = 'blue-green'\nfeedback = 'kafka:t'\n[[metric]]\nname = 'a'\nminimum_labels = 1",
            'policy.toml: policy [[metric]] number 1 minimum_labels is for kind canary, not "blue-green"',
        ),
        (
            "feedback = 'kafka:t'\n[[metric]]\nname = 'a'\nmargin = -1",
            "policy.toml: policy [[metric]] number 1 margin is -1, must be",
        ),
        (
            "kind = 'ab'\nfeedback = 'kafka:t'\nab.feedback = 'kafka:t'\n[[metric]]\nname = 'a'",
            "policy.toml: policy feedback and [ab] feedback say the same",
        ),
        ("kind = 'ab'", "policy.toml: policy needs a [[metric]] with primary = true"),
        ("kind = 'ab'\n[[metric]]\nname = 'a'", "policy.toml: policy [ab] feedback must be"),
        (
            "kind = 'ab'\n[[metric]]\nname = 'a'\nbaseline = 3",
            'policy.toml: policy [[metric]] "a" baseline is a proportion, 0 to 1, not 3',
        ),
        (
            "kind = 'ab'\n[[metric]]\nname = 'a'\n[[metric]]\nname = 'a'",
            'policy has two [[metric]] named "a"',
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, said: str) -> None:
    """The file, the key, and what would be right."""
    with pytest.raises(ConfigError) as caught:
        parse_policy(text, "policy.toml")

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_steps_rise_and_leave_room_for_the_control_slice() -> None:
    """With a control slice of equal size nothing above half is possible."""
    steps = "[[step]]\npercent = {}\ndwell_s = 1\nminimum = 1\n"

    with pytest.raises(ConfigError, match="must rise"):
        parse_policy(steps.format(5) + steps.format(5), "p")
    with pytest.raises(ConfigError, match="at most 50"):
        parse_policy(steps.format(60), "p")
    assert parse_policy("control = false\n" + steps.format(60), "p").steps[0].percent == 60


def test_the_hash_is_of_the_meaning() -> None:
    """However numbers are written, and after a way through JSON, the same policy has the same hash."""
    policy = parse_policy("bake_s = 600", "p")

    assert policy.hash == parse_policy("bake_s = 600.0", "p").hash
    assert msgspec.json.decode(msgspec.json.encode(policy), type=Policy).hash == policy.hash
    assert policy.hash != default_policy().hash


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A missing file is an error of the settings."""
    with pytest.raises(ConfigError, match=r"policy file .*nowhere\.toml does not exist"):
        load_policy(tmp_path / "nowhere.toml")


def test_the_page_has_every_key_with_its_default() -> None:
    """docs/policies.md names each key, and the default that the code has."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text()
    usual = {**policies._USUAL, "gate_before": []}
    missing = []
    for section in (policies._Top, *policies._TABLES.values(), *policies._LISTS.values()):
        for field in msgspec.structs.fields(section):
            default = usual.get(field.name) if field.default is None else field.default
            plain = int(default) if isinstance(default, float) and default >= 5 else default
            shown = "required" if field.required else f"`{msgspec.json.encode(plain).decode()}`"
            if f"| `{field.name}` | {shown} |" not in page:
                missing.append(f"{section.__name__}: `{field.name}` {shown}")
    assert missing == []

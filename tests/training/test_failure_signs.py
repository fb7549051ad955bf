"""Each sign of a failing training is told by the history that shows it, once, and by no healthy one."""

import pytest

from bankwise.training.failure_signs import FailureSigns


def line(step, **changes):
    """A line of a healthy training of two layers: loss falls, recall rises, margins and use are those of a fair one."""
    healthy = {
        "step": step,
        "loss": 4.0 - step / 1000,
        "companion_gap": 0.5 - step / 10_000,
        "layers": [3, 4],
        "recall": [0.60 + step / 10_000, 0.62],
        "recall_by_position": {"0-1K": [0.6, 0.63], "1-4K": [0.6, 0.61], "4-8K": [0.59, 0.61]},
        "margin_p5": [0.0025, 0.0025],
        "churn": [0.2, 0.1] if step > 50 else [None, None],
        "usage_tokens": step * 1000,
        "dead": [0.0, 0.02],
        "router_gradient": {"lm": [1e-3, 1e-9], "aux": [1e-3, None]},
    }
    return healthy | changes


def history(*changes):
    return [line(50 * place, **change) for place, change in enumerate(changes, start=1)]


def told(lines, active=(16, 16)):
    """(step, sign) of everything that is told."""
    signs = FailureSigns((64, 64), active)
    return [(line["step"], warned.sign) for line in lines for warned in signs.look(line)]


def behind(*gaps):
    return [{"companion_gap": gap} for gap in gaps]


def by_position(*first_layer):
    return {"recall_by_position": dict(zip(("0-1K", "1-4K", "4-8K"), ([r, 0.61] for r in first_layer), strict=True))}


HEALTHY = {
    "plain": [{}] * 8,
    "recall falls in one reading only": [{}, {"recall": [0.5, 0.5]}, {}, {}],
    "recall falls by little": [{}, {"recall": [0.59, 0.61]}, {"recall": [0.59, 0.61]}],
    "recall falls and loss too little": [{"loss": 3.0}, {"recall": [0.5, 0.5], "loss": 2.99}]
    + [{"recall": [0.5, 0.5], "loss": 2.985}] * 3,
    "recall falls as loss rises": [{"loss": 3.0}] + [{"recall": [0.5, 0.5], "loss": 3.3}] * 3,
    "loss falls and recall with it rises from low": [{"recall": [0.4, 0.4]}, {"recall": [0.5, 0.5]}, {}, {}],
    "margins near 0 at rest": [{"margin_p5": [0.0, 0.0], "churn": [0.05, 0.05]}] * 4,
    "high churn with margins": [{"churn": [0.5, 0.5]}] * 4,
    "no companion": behind(None, None, None, None, None),
    "the gap rises twice and falls": behind(0.3, 0.32, 0.34, 0.33, 0.35),
    "the gap rises by little": behind(0.3, 0.305, 0.31, 0.315),
    "flaps once": [{}, {"margin_p5": [0.0, 0.0], "churn": [0.5, 0.5]}, {}, {}],
    "flaps in turn": [{}]
    + [{"margin_p5": [0.0, 0.003], "churn": [0.5, 0.5]}, {"margin_p5": [0.003, 0.0], "churn": [0.5, 0.5]}] * 2,
    "a dense layer": [{"margin_p5": [None, None]}] * 4,
    "recall falls at all positions": [by_position(0.6, 0.6, 0.6)] + [by_position(0.5, 0.5, 0.5)] * 3,
    "recall falls at two positions": [by_position(0.6, 0.6, 0.6)] + [by_position(0.6, 0.5, 0.5)] * 3,
    "one bucket": [{"recall_by_position": {"0-1K": [0.6, 0.6]}}]
    + [{"recall_by_position": {"0-1K": [0.5, 0.5]}}] * 3,
    "never chosen by a few tokens": [{"usage_tokens": 9_999, "dead": [0.4, 0.4]}],
    "zero for less than a hundred steps": [{"router_gradient": {"lm": [0.0, 0.0]}}] * 2 + [{}] * 2,
    "zero in other layers each time": [{"router_gradient": {"lm": [0.0, 1.0]}}, {"router_gradient": {"lm": [1.0, 0.0]}}]
    * 3,
    "no gradient to expect": [{"router_gradient": {"lm": [None, None]}}] * 6,
}  # fmt: skip

SIGNS = {
    "absorption": ([{}] + [{"recall": [0.56, 0.57]}] * 5, 150),
    "falling_behind": (behind(None, 0.3, 0.31, 0.32, 0.33, 0.34), 250),
    "flapping": ([{}] + [{"margin_p5": [0.0004, 0.002], "churn": [0.4, 0.4]}] * 4, 150),
    "position_bucket": ([by_position(0.6, 0.6, 0.6)] + [by_position(0.6, 0.59, 0.5)] * 4, 150),
    "dead_channels": ([{"dead": [0.0, 0.11]}] * 4, 50),
    "zero_router_gradient": ([{}] + [{"router_gradient": {"lm": [1e-3, 0.0]}}] * 4, 200),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_history_is_told_nothing(name):
    assert told(history(*HEALTHY[name])) == []


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_is_told_once(sign):
    changes, step = SIGNS[sign]
    assert told(history(*changes)) == [(step, sign)]


MESSAGES = {
    "absorption": ["0.613 (step 50) to 0.565", "aux_weight", "random_predictor"],
    "falling_behind": ["from 0.300 to 0.330", "lowest at step 100 (0.300)", "a lower lr"],
    "flapping": ["layer 3:", "predictor_lr", "ste_tau"],
    "position_bucket": ["layer 3:", "4-8K", "0.600 to 0.500", "bankwise scan"],
    "dead_channels": ["layer 4:", "11%", "aux_weight"],
    "zero_router_gradient": ["layer 4:", "100 steps", "gate_weight"],
}


@pytest.mark.parametrize("sign", SIGNS)
def test_a_warning_says_what_was_seen_and_what_to_do(sign):
    signs = FailureSigns((64, 64), (16, 16))
    (warned,) = [warned for line in history(*SIGNS[sign][0]) for warned in signs.look(line)]
    for part in MESSAGES[sign]:
        assert part in warned.message
    assert "\n" not in warned.message
    assert warned.stops is (sign == "zero_router_gradient")


def test_what_counts_as_a_margin_near_zero_follows_from_the_banks():
    # Wide spacing at the cut of small banks: what is near 0 there would be normal in a bank of 64.
    changes = [{}] + [{"margin_p5": [0.002, 0.002], "churn": [0.4, 0.4]}] * 3
    assert told(history(*changes)) == []
    small = FailureSigns((16, 16), (4, 4))
    assert [warned.sign for line in history(*changes) for warned in small.look(line)] == ["flapping"]

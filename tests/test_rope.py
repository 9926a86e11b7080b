"""Rotary frequencies against numbers printed by transformers 5.23 (ROPE_INIT_FUNCTIONS)."""

from __future__ import annotations

from typing import Any

import pytest

from onnxstream_nb.errors import ModelError, UnsupportedError
from onnxstream_nb.formats.rope import rotary

DIM, CONTEXT = 16, 256
CASES: dict[str, tuple[dict[str, Any], list[float], float]] = {
    "default": (
        {"rope_theta": 10000.0},
        [1.0, 0.3162278, 0.1, 0.03162278, 0.01, 0.003162278, 0.001, 0.0003162278],
        1.0,
    ),
    "linear": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.0,
    ),
    "llama3": (
        {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
        [1.0, 0.07940301, 0.004700754, 0.0009115831, 0.0001767767, 3.428102e-05, 6.64787e-06,
         1.289173e-06],
        1.0,
    ),
    "yarn": (
        {
            "type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        [1.0, 0.2371708, 0.05, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.138629436111989,
    ),
    "yarn with all its fields": (
        {
            "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 40.0, "beta_fast": 16,
            "beta_slow": 2, "mscale": 0.707, "mscale_all_dim": 1.2, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        [1.0, 0.1778279, 0.03162278, 0.001738219, 2.5e-05, 4.445698e-06, 7.905694e-07,
         1.405853e-07],
        0.8739404576185121,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case: str) -> None:
    parameters, frequencies, attention_factor = CASES[case]
    result = rotary(parameters, DIM, CONTEXT, "config.json")
    assert result.frequencies == pytest.approx(frequencies, rel=1e-6)
    assert result.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_absent_original_context_is_the_model_s_context() -> None:
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
    absent = {"rope_type": "yarn", "factor": 4.0}
    assert rotary(given, DIM, CONTEXT, "") == rotary(absent, DIM, CONTEXT, "")


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, UnsupportedError, "'dynamic' is not supported"),
        ({"type": ["yarn"]}, UnsupportedError, r"\['yarn'\] is not supported"),
        ({"rope_type": "linear"}, ModelError, "'factor' is missing"),
        ({"rope_type": "linear", "factor": 0}, ModelError, "factor = 0 is not a positive"),
        ({"rope_type": "linear", "factor": True}, ModelError, "factor = True is not"),
        ({"rope_type": "linear", "factor": float("nan")}, ModelError, "factor = nan"),
        ({"rope_theta": 1.0}, ModelError, "rope_theta = 1.0 must be greater"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "'partial_rotary_factor' = 0.5"),
        ({"rope_type": "linear", "factor": 2, "warp": 1}, UnsupportedError, "'warp' = 1"),
        (
            {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4},
            ModelError,
            "high_freq_factor must be greater",
        ),
    ],
)
def test_bad_parameters_are_named(
    parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        rotary(parameters, DIM, CONTEXT, "models/x/config.json: rope_parameters")
    assert "models/x/config.json: rope_parameters" in str(caught.value)
